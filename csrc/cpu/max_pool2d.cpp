// output = max_pool2d(input), and where in its window each value was.
//
// The layouts want different loops:
//   channel lines  channels side by side: vectors run over channels, images are read in place.
//   planes         anything else: lines of one plane are copied, widened, with a border of -inf and
//                  their columns sorted by w % stride; vectors then run along a line of output.
#include "kernels.h"
#include "pool.h"

namespace gdfast::cpu::GDFAST_ISA {
namespace {

template <typename T>
constexpr T kLowest = -__builtin_inff();

// Values of a task: enough to be worth handing out, few enough for many tasks.
constexpr int64_t kTaskValues = 16 * 1024;
// A band of lines stays in the second-level cache beside what else is there.
constexpr int64_t kBandBytes = 128 * 1024;

template <typename T, typename I>
class Planes {
  using A = typename Accumulator<T>::type;
  using Place = PlaceOf<A>;

 public:
  Planes(const MaxPool2dProblem& problem, const T* input, T* output, I* argmax, int threads)
      : p_(problem), input_(input), output_(output), argmax_(argmax), threads_(threads) {
    const int64_t low = floor_quotient(-p_.pad_w, p_.stride_w);
    const int64_t high = floor_quotient((p_.S - 1) * p_.dilation_w - p_.pad_w, p_.stride_w);
    left_ = -low;
    padded_ = round_up(p_.Q, kLanes<A>);
    // Whole vectors are read beyond the last column.
    columns_ = left_ + max_of(padded_ + max_of(0, high), ceil_div(p_.W, p_.stride_w));
    const int64_t bytes = p_.stride_h * line_size() * static_cast<int64_t>(sizeof(A));
    band_ = min_of(p_.P, max_of(4, kBandBytes / bytes));
    band_lines_ = min_of(p_.H, (band_ - 1) * p_.stride_h + (p_.R - 1) * p_.dilation_h + 1);
  }

  void run() {
    const ThreadScratch memory(
        threads_, [&](Carver& carver) { carve_shared(carver); },
        [&](Carver& carver) { carve(carver); });
    for (int64_t s = 0; s < p_.S; ++s) {
      const int64_t w = s * p_.dilation_w - p_.pad_w, shift = floor_quotient(w, p_.stride_w);
      offsets_[s] = (w - shift * p_.stride_w) * columns_ + left_ + shift;
    }
    for (int64_t q = 0; q < padded_; ++q) {
      const TapRange taps(q * p_.stride_w - p_.pad_w, p_.dilation_w, p_.S, p_.W);
      first_[q] = static_cast<Place>(taps.first < taps.end && q < p_.Q ? taps.first : kNowhere);
    }
    const int64_t bands = ceil_div(p_.P, band_), tasks = p_.N * p_.C * bands;
    const int64_t at_once = max_of(1, kTaskValues / (p_.stride_h * band_ * p_.W));
    parallel_for(ceil_div(tasks, at_once), threads_, [&](int64_t task, int thread) {
      Carver own = memory.of(thread);
      const Scratch scratch = carve(own);
      const int64_t end = min_of(tasks, (task + 1) * at_once);
      for (int64_t index = task * at_once; index < end; ++index) {
        const int64_t plane = index / bands, band = index % bands;
        run_band(plane / p_.C, plane % p_.C, band * band_, min_of(p_.P, (band + 1) * band_),
                 scratch);
      }
    });
  }

 private:
  struct Scratch {
    A* band;         // [band_lines_][stride_w][columns_]
    A* line;         // one line of input in order
    A* values;       // one line of output
    I* places;       // one line of argmax
    const A** seen;  // [R] the lines that one line of output sees
  };

  int64_t line_size() const { return p_.stride_w * columns_; }

  void carve_shared(Carver& carver) {
    offsets_ = carver.template take<int64_t>(p_.S);
    first_ = carver.template take<Place>(padded_);
  }

  Scratch carve(Carver& carver) const {
    return {carver.template take<A>(band_lines_ * line_size()), carver.template take<A>(p_.W),
            carver.template take<A>(padded_), carver.template take<I>(padded_),
            carver.template take<const A*>(p_.R)};
  }

  void copy_line(const T* from, A* to, A* line) const {
    const A* in_order = line;
    if constexpr (kSame<T, A>) {
      if (p_.input.w == 1) in_order = from;
    }
    if (in_order == line) copy_widened(from, p_.input.w, p_.W, line);
    split_phases(in_order, p_.W, p_.stride_w, to + left_, columns_);
    for (int64_t phase = 0; phase < p_.stride_w; ++phase, to += columns_) {
      const int64_t count = max_of(0, ceil_div(p_.W - phase, p_.stride_w));
      for (int64_t x = 0; x < left_; ++x) to[x] = kLowest<A>;
      for (int64_t x = left_ + count; x < columns_; ++x) to[x] = kLowest<A>;
    }
  }

  void run_band(int64_t n, int64_t c, int64_t begin, int64_t end, const Scratch& scratch) const {
    const T* plane = input_ + n * p_.input.n + c * p_.input.c;
    const int64_t first = max_of(0, begin * p_.stride_h - p_.pad_h);
    const int64_t last =
        min_of(p_.H, (end - 1) * p_.stride_h - p_.pad_h + (p_.R - 1) * p_.dilation_h + 1);
    for (int64_t h = first; h < last; ++h) {
      copy_line(plane + h * p_.input.h, scratch.band + (h - first) * line_size(), scratch.line);
    }
    T* values = output_ + n * p_.output.n + c * p_.output.c;
    I* places = argmax_ + n * p_.argmax.n + c * p_.argmax.c;
    for (int64_t p = begin; p < end; ++p) {
      const int64_t start = p * p_.stride_h - p_.pad_h;
      const TapRange taps(start, p_.dilation_h, p_.R, p_.H);
      for (int64_t r = taps.first; r < taps.end; ++r) {
        scratch.seen[r] = scratch.band + (start + r * p_.dilation_h - first) * line_size();
      }
      T* value_line = values + p * p_.output.h;
      I* place_line = places + p * p_.argmax.h;
      // 2 and 3 are what nearly all networks have.
      if (p_.S == 2) {
        run_line<2>(taps, scratch, value_line, place_line);
      } else if (p_.S == 3) {
        run_line<3>(taps, scratch, value_line, place_line);
      } else {
        run_line<0>(taps, scratch, value_line, place_line);
      }
    }
  }

  template <int kTaps>
  void run_line(const TapRange& taps, const Scratch& scratch, T* values, I* places) const {
    const int64_t S = kTaps > 0 ? kTaps : p_.S;
    const Places<A> nowhere = same_places<A>(kNowhere);
    const bool in_place = kSame<T, A> && p_.output.w == 1, places_in_place = p_.argmax.w == 1;
    for (int64_t q = 0; q < padded_; q += kLanes<A>) {
      const Places<A> first = load(first_ + q);
      const bool sees = taps.first < taps.end;
      Best<A> best{broadcast(kLowest<A>), nowhere};
      if (sees) best.place = first < 0 ? nowhere : first + same_places<A>(taps.first * S);
      for (int64_t r = taps.first; r < taps.end; ++r) {
        const A* line = scratch.seen[r] + q;
        Places<A> place = same_places<A>(r * S);
#pragma GCC unroll 3
        for (int64_t s = 0; s < S; ++s) {
          best.offer(load(line + offsets_[s]), place);
          place += 1;
        }
      }
      if (p_.relu) best.clamp();
      const bool whole = q + kLanes<A> <= p_.Q;
      store<A>(in_place && whole ? reinterpret_cast<A*>(values) + q : scratch.values + q,
               best.value);
      store_places<A>(places_in_place && whole ? places + q : scratch.places + q, best.place);
    }
    const int64_t done = p_.Q / kLanes<A> * kLanes<A>;
    const int64_t value = in_place ? done : 0, place = places_in_place ? done : 0;
    copy_narrowed(scratch.values + value, p_.Q - value, values + value * p_.output.w, p_.output.w);
    for (int64_t q = place; q < p_.Q; ++q) places[q * p_.argmax.w] = scratch.places[q];
  }

  const MaxPool2dProblem& p_;
  const T* input_;
  T* output_;
  I* argmax_;
  int threads_;
  int64_t left_, padded_, columns_, band_, band_lines_;
  int64_t* offsets_;  // [S] where in a line of the band a window's first column sees through a tap
  Place* first_;      // [padded_] the first tap of each window that lies in the image
};

// kVectors vectors of channels of one window.
template <int kVectors, typename T, typename I>
GDFAST_INLINE void pool_channels(const MaxPool2dProblem& p, const T* corner, const TapRange& rows,
                                 const TapRange& columns, T* output, I* argmax) {
  using A = typename Accumulator<T>::type;
  const bool sees = rows.first < rows.end && columns.first < columns.end;
  const int64_t first = sees ? rows.first * p.S + columns.first : kNowhere;
  Best<A> best[kVectors];
  for (int v = 0; v < kVectors; ++v) best[v] = {broadcast(kLowest<A>), same_places<A>(first)};
  for (int64_t r = rows.first; r < rows.end; ++r) {
    const T* line = corner + r * p.dilation_h * p.input.h;
    for (int64_t s = columns.first; s < columns.end; ++s) {
      const T* pixel = line + s * p.dilation_w * p.input.w;
      const Places<A> place = same_places<A>(r * p.S + s);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        best[v].offer(load_widened<A>(pixel + v * kLanes<A>), place);
      }
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    if (p.relu) best[v].clamp();
    store_narrowed<A>(output + v * kLanes<A>, best[v].value);
    store_places<A>(argmax + v * kLanes<A>, best[v].place);
  }
}

template <typename T, typename I>
void run_channel_lines(const MaxPool2dProblem& p, const T* input, T* output, I* argmax,
                       int threads) {
  constexpr int64_t kVector = kLanes<typename Accumulator<T>::type>;
  const int64_t lines = max_of(1, kTaskValues / (p.stride_h * p.W * p.C));
  parallel_for(ceil_div(p.N * p.P, lines), threads, [&](int64_t task, int) {
    for (int64_t line = task * lines; line < min_of(p.N * p.P, (task + 1) * lines); ++line) {
      const int64_t n = line / p.P, i = line % p.P, h = i * p.stride_h - p.pad_h;
      const TapRange rows(h, p.dilation_h, p.R, p.H);
      for (int64_t j = 0; j < p.Q; ++j) {
        const int64_t w = j * p.stride_w - p.pad_w;
        const TapRange columns(w, p.dilation_w, p.S, p.W);
        const T* from = input + n * p.input.n + h * p.input.h + w * p.input.w;
        T* to = output + n * p.output.n + i * p.output.h + j * p.output.w;
        I* places = argmax + n * p.argmax.n + i * p.argmax.h + j * p.argmax.w;
        int64_t c = 0;
        for (; c + 4 * kVector <= p.C; c += 4 * kVector) {
          pool_channels<4>(p, from + c, rows, columns, to + c, places + c);
        }
        for (; c < p.C; c += kVector) {
          // The last vector ends at the last channel, and computes some channels again.
          const int64_t at = min_of(c, p.C - kVector);
          pool_channels<1>(p, from + at, rows, columns, to + at, places + at);
        }
      }
    }
  });
}

}  // namespace

void max_pool2d(const MaxPool2dProblem& problem, const void* input, void* output, void* argmax,
                int threads) {
  if (problem.N * problem.C == 0) return;
  with_dtype(problem.dtype, [&](auto element) {
    using T = decltype(element);
    with_place_type(problem, [&](auto place) {
      using I = decltype(place);
      const bool lines = problem.input.c == 1 && problem.output.c == 1 && problem.argmax.c == 1 &&
                         problem.C >= kLanes<typename Accumulator<T>::type>;
      const auto* from = static_cast<const T*>(input);
      auto* to = static_cast<T*>(output);
      auto* places = static_cast<I*>(argmax);
      if (lines) {
        run_channel_lines(problem, from, to, places, threads);
      } else {
        Planes<T, I>(problem, from, to, places, threads).run();
      }
    });
  });
}

}  // namespace gdfast::cpu::GDFAST_ISA
