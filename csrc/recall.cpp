#include "recall.h"

#include <vector>

#include "tensor_facts.h"

namespace gdfast {
namespace {

constexpr const char* kMemoCapsule = "gdfast.memo";

struct Kept {
  PyObject *holder, *key, *value;
};
struct Asked {
  PyObject *function, *answer;
};
struct Source {
  PyObject *object, *name, *key;  // null for an argument
  Py_ssize_t argument;
};

struct Memo {
  std::vector<Kept> kept;
  std::vector<Asked> asked;
  std::vector<Source> tensors;
  std::vector<PyObject*> needs;
  PyObject* facts = nullptr;
  PyObject* all = nullptr;  // the tuples, which keep everything alive

  ~Memo() { Py_XDECREF(all); }
};

// The dicts of objects that are referred to weakly, each looked up once for what is asked of it in
// a row: a memo that owned them would keep alive whatever they lead to.
class Dicts {
 public:
  ~Dicts() { Py_XDECREF(dict_); }

  // Borrowed; null where the object is gone, or with an exception set.
  PyObject* of(PyObject* reference) {
    if (reference == reference_) return dict_;
    Py_CLEAR(dict_);
    reference_ = nullptr;
#if PY_VERSION_HEX >= 0x030D0000
    PyObject* object = nullptr;
    if (PyWeakref_GetRef(reference, &object) != 1) return nullptr;
#else
    PyObject* const object = PyWeakref_GetObject(reference);
    if (object == nullptr || object == Py_None) return nullptr;
    Py_INCREF(object);
#endif
    dict_ = PyObject_GenericGetDict(object, nullptr);
    Py_DECREF(object);
    if (dict_ != nullptr) reference_ = reference;
    return dict_;
  }

 private:
  PyObject *reference_ = nullptr, *dict_ = nullptr;
};

Memo* memo_of(PyObject* capsule) {
  return static_cast<Memo*>(PyCapsule_GetPointer(capsule, kMemoCapsule));
}

bool read_kept(PyObject* kept, Memo* memo) {
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(kept); ++i) {
    Kept each;
    PyObject* const triple = PyTuple_GET_ITEM(kept, i);
    if (!PyArg_ParseTuple(triple, "OOO", &each.holder, &each.key, &each.value)) return false;
    if (!PyDict_Check(each.holder) && !PyWeakref_CheckRef(each.holder)) {
      PyErr_SetString(PyExc_TypeError, "make_memo: kept: expected dicts or weak references");
      return false;
    }
    memo->kept.push_back(each);
  }
  return true;
}

bool read_asked(PyObject* asked, Memo* memo) {
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(asked); ++i) {
    Asked each;
    if (!PyArg_ParseTuple(PyTuple_GET_ITEM(asked, i), "OO", &each.function, &each.answer)) {
      return false;
    }
    memo->asked.push_back(each);
  }
  return true;
}

bool read_tensors(PyObject* tensors, Memo* memo) {
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(tensors); ++i) {
    PyObject* const from = PyTuple_GET_ITEM(tensors, i);
    Source source{nullptr, nullptr, nullptr, 0};
    if (PyLong_Check(from)) {
      source.argument = PyLong_AsSsize_t(from);
      if (source.argument < 0) {
        PyErr_SetString(PyExc_ValueError, "make_memo: tensors: expected numbers of arguments");
        return false;
      }
    } else if (!PyArg_ParseTuple(from, "OOO", &source.object, &source.name, &source.key)) {
      return false;
    } else if (!PyWeakref_CheckRef(source.object)) {
      PyErr_SetString(PyExc_TypeError, "make_memo: tensors: expected weak references");
      return false;
    }
    memo->tensors.push_back(source);
  }
  return true;
}

PyObject* make_memo(PyObject*, PyObject* arguments) {
  PyObject *kept, *asked, *tensors, *facts, *needs;
  if (!PyArg_ParseTuple(arguments, "O!O!O!SO!", &PyTuple_Type, &kept, &PyTuple_Type, &asked,
                        &PyTuple_Type, &tensors, &facts, &PyTuple_Type, &needs)) {
    return nullptr;
  }
  Memo* memo = new Memo;
  PyObject* capsule =
      PyCapsule_New(memo, kMemoCapsule, [](PyObject* self) { delete memo_of(self); });
  if (capsule == nullptr) {
    delete memo;
    return nullptr;
  }
  Py_INCREF(memo->all = arguments);
  memo->facts = facts;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(needs); ++i) {
    memo->needs.push_back(PyTuple_GET_ITEM(needs, i));
  }
  if (!read_kept(kept, memo) || !read_asked(asked, memo) || !read_tensors(tensors, memo)) {
    Py_DECREF(capsule);
    return nullptr;
  }
  if (memo->tensors.size() > static_cast<size_t>(kMostTensors) ||
      memo->needs.size() > memo->tensors.size()) {
    PyErr_SetString(PyExc_ValueError, "make_memo: tensors, needs: expected at most 48 tensors");
    Py_DECREF(capsule);
    return nullptr;
  }
  return capsule;
}

// 1 where it is so, 0 where not, -1 with an exception set.
int is_kept(const Kept& kept, Dicts& dicts) {
  PyObject* const dict = PyDict_Check(kept.holder) ? kept.holder : dicts.of(kept.holder);
  if (dict == nullptr) return PyErr_Occurred() ? -1 : 0;
  PyObject* const now = PyDict_GetItemWithError(dict, kept.key);
  if (now == nullptr) return PyErr_Occurred() ? -1 : kept.value == Py_NotImplemented;
  if (kept.value != Py_Ellipsis) return now == kept.value;
  Py_INCREF(now);  // asking it may run Python, which may drop it
  const int is_false = PyObject_Not(now);
  Py_DECREF(now);
  return is_false;
}

int is_answered(const Asked& asked) {
  PyObject* const answer = PyObject_CallNoArgs(asked.function);
  if (answer == nullptr) return -1;
  const int same = PyObject_RichCompareBool(answer, asked.answer, Py_EQ);
  Py_DECREF(answer);
  return same;
}

int needs_as(PyObject* tensor, PyObject* needs) {
  if (tensor == Py_None) return 1;
  static PyObject* const name = PyUnicode_InternFromString("requires_grad");
  PyObject* const answer = PyObject_GetAttr(tensor, name);
  if (answer == nullptr) return -1;
  Py_DECREF(answer);
  return answer == needs;  // True or False
}

// What a dict of an object has by a key; borrowed, null where there is none or with an exception.
PyObject* find(const Source& source, Dicts& dicts) {
  PyObject* const own = dicts.of(source.object);
  if (own == nullptr) return nullptr;
  PyObject* const dict = PyDict_GetItemWithError(own, source.name);
  if (dict == nullptr || !PyDict_Check(dict)) return nullptr;
  return PyDict_GetItemWithError(dict, source.key);
}

// Puts the tensors into a tuple; 1 where all is as it was, 0 where not, -1 with an exception.
int look_up(const Memo& memo, Dicts& dicts, PyObject* const* arguments, Py_ssize_t count,
            PyObject* tuple) {
  Py_ssize_t place = 0;
  for (const Source& source : memo.tensors) {
    PyObject* each;
    if (source.object == nullptr) {
      if (source.argument >= count) return 0;
      each = arguments[source.argument];
    } else {
      each = find(source, dicts);
      if (each == nullptr) return PyErr_Occurred() ? -1 : 0;
    }
    Py_INCREF(each);
    PyTuple_SET_ITEM(tuple, place++, each);
  }
  PyObject* const* const tensors = &PyTuple_GET_ITEM(tuple, 0);
  int same = have_facts(tensors, place, memo.facts);  // and are tensors
  for (size_t i = 0; same == 1 && i < memo.needs.size(); ++i) {
    same = needs_as(tensors[i], memo.needs[i]);
  }
  return same;
}

PyObject* recall(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count < 1) {
    PyErr_SetString(PyExc_TypeError, "recall: expected memo, *arguments");
    return nullptr;
  }
  const Memo* const memo = memo_of(arguments[0]);
  if (memo == nullptr) return nullptr;
  Dicts dicts;
  int same = 1;
  for (size_t i = 0; same == 1 && i < memo->kept.size(); ++i) same = is_kept(memo->kept[i], dicts);
  for (size_t i = 0; same == 1 && i < memo->asked.size(); ++i) same = is_answered(memo->asked[i]);
  if (same == 1) {
    const int watches = is_anyone_watching();
    same = watches < 0 ? -1 : !watches;
  }
  if (same < 0) return nullptr;
  if (!same) Py_RETURN_NONE;
  PyObject* const tuple = PyTuple_New(static_cast<Py_ssize_t>(memo->tensors.size()));
  if (tuple == nullptr) return nullptr;
  same = look_up(*memo, dicts, arguments + 1, count - 1, tuple);
  if (same == 1) return tuple;
  Py_DECREF(tuple);
  if (same < 0) return nullptr;
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {
    {"make_memo", make_memo, METH_VARARGS, "What a call rested on, for recall."},
    {"recall", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(recall)), METH_FASTCALL,
     "The tensors of a call where all that it rested on is so again, else None."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

bool add_recall(PyObject* module) { return PyModule_AddFunctions(module, methods) == 0; }

}  // namespace gdfast
