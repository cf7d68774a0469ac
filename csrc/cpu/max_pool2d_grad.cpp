// grad_input of max_pool2d: every pixel gathers from the windows that took it.
//
// Each value is written once, as a sum in the order of the windows, so that neither a pass of zeros
// nor an order of threads is needed. The two kinds of loops are those of max_pool2d.cpp.
#include "kernels.h"
#include "pool.h"

namespace gdfast::cpu::GDFAST_ISA {
namespace {

constexpr int64_t kTaskValues = 16 * 1024;
// A band of gradients and places stays in the second-level cache beside what else is there.
constexpr int64_t kBandBytes = 256 * 1024;

// A window that sees a line or column of pixels through one of its taps.
struct Window {
  int64_t index, tap;
};

// The windows of one axis that see a position, in their order; returns how many.
inline int64_t windows_of(int64_t position, int64_t pad, int64_t stride, int64_t dilation,
                          int64_t taps, int64_t windows, Window* found) {
  int64_t count = 0;
  for (int64_t tap = taps - 1; tap >= 0; --tap) {
    const int64_t start = position + pad - tap * dilation;
    if (start < 0 || start % stride != 0 || start / stride >= windows) continue;
    found[count++] = {start / stride, tap};
  }
  return count;
}

template <typename T, typename I>
class Planes {
  using A = typename Accumulator<T>::type;
  using Place = PlaceOf<A>;

 public:
  Planes(const MaxPool2dProblem& problem, const T* grad_output, const I* argmax, T* grad_input,
         int threads)
      : p_(problem), from_(grad_output), argmax_(argmax), to_(grad_input), threads_(threads) {
    // Pixel `phase + stride * j` lies in window `j + shift` through each tap of that phase.
    const int64_t low = floor_quotient(p_.pad_w - (p_.S - 1) * p_.dilation_w, p_.stride_w);
    const int64_t high = floor_quotient(p_.stride_w - 1 + p_.pad_w, p_.stride_w);
    width_ = round_up(ceil_div(p_.W, p_.stride_w), kLanes<A>);
    left_ = max_of(0, -low);
    columns_ = left_ + max_of(p_.Q, width_ + high);
    const int64_t bytes = columns_ * static_cast<int64_t>(sizeof(A) + sizeof(Place));
    // Lines of pixels in a band, and of windows that they lie in.
    const int64_t windows = max_of(4, kBandBytes / bytes);
    band_ = min_of(p_.H, windows * p_.stride_h);
    band_windows_ = min_of(p_.P, ceil_div(band_ - 1 + (p_.R - 1) * p_.dilation_h, p_.stride_h) + 1);
  }

  void run() {
    const ThreadScratch memory(
        threads_, [&](Carver& carver) { carve_shared(carver); },
        [&](Carver& carver) { carve(carver); });
    int64_t count = 0;
    for (int64_t phase = 0; phase < p_.stride_w; ++phase) {
      first_tap_[phase] = count;
      for (int64_t tap = p_.S - 1; tap >= 0; --tap) {
        const int64_t start = phase + p_.pad_w - tap * p_.dilation_w;
        const int64_t shift = floor_quotient(start, p_.stride_w);
        if (shift * p_.stride_w == start) taps_[count++] = {left_ + shift, tap};
      }
    }
    first_tap_[p_.stride_w] = count;
    const int64_t bands = ceil_div(p_.H, band_), tasks = p_.N * p_.C * bands;
    const int64_t at_once = max_of(1, kTaskValues / (band_ * p_.W));
    parallel_for(ceil_div(tasks, at_once), threads_, [&](int64_t task, int thread) {
      Carver own = memory.of(thread);
      const Scratch scratch = carve(own);
      const int64_t end = min_of(tasks, (task + 1) * at_once);
      for (int64_t index = task * at_once; index < end; ++index) {
        const int64_t plane = index / bands, band = index % bands;
        run_band(plane / p_.C, plane % p_.C, band * band_, min_of(p_.H, (band + 1) * band_),
                 scratch);
      }
    });
  }

 private:
  struct Scratch {
    A* grads;       // [band_windows_][columns_]
    Place* places;  // the same of argmax
    Window* rows;   // [R]
    A* parts;       // [stride_w][width_] one line of grad_input, sorted by w % stride
    A* line;        // the same in order
  };

  void carve_shared(Carver& carver) {
    first_tap_ = carver.template take<int64_t>(p_.stride_w + 1);
    taps_ = carver.template take<Window>(p_.S);
  }

  Scratch carve(Carver& carver) const {
    return {carver.template take<A>(band_windows_ * columns_),
            carver.template take<Place>(band_windows_ * columns_),
            carver.template take<Window>(p_.R), carver.template take<A>(p_.stride_w * width_),
            carver.template take<A>(p_.W)};
  }

  void copy_windows(const T* grads, const I* places, A* grad_line, Place* place_line) const {
    for (int64_t x = 0; x < left_; ++x) place_line[x] = kNowhere;
    for (int64_t x = left_ + p_.Q; x < columns_; ++x) place_line[x] = kNowhere;
    copy_widened(grads, p_.output.w, p_.Q, grad_line + left_);
    if (p_.argmax.w == 1) {
      for (int64_t q = 0; q < p_.Q; ++q) place_line[left_ + q] = places[q];
    } else {
      for (int64_t q = 0; q < p_.Q; ++q) place_line[left_ + q] = places[q * p_.argmax.w];
    }
  }

  void run_band(int64_t n, int64_t c, int64_t begin, int64_t end, const Scratch& scratch) const {
    const T* grads = from_ + n * p_.output.n + c * p_.output.c;
    const I* places = argmax_ + n * p_.argmax.n + c * p_.argmax.c;
    const int64_t reach = (p_.R - 1) * p_.dilation_h;
    const int64_t first = max_of(0, ceil_div(begin + p_.pad_h - reach, p_.stride_h));
    const int64_t last = min_of(p_.P, (end - 1 + p_.pad_h) / p_.stride_h + 1);
    for (int64_t p = first; p < last; ++p) {
      copy_windows(grads + p * p_.output.h, places + p * p_.argmax.h,
                   scratch.grads + (p - first) * columns_, scratch.places + (p - first) * columns_);
    }
    T* plane = to_ + n * p_.input.n + c * p_.input.c;
    for (int64_t h = begin; h < end; ++h) {
      const int64_t rows =
          windows_of(h, p_.pad_h, p_.stride_h, p_.dilation_h, p_.R, p_.P, scratch.rows);
      run_line(rows, first, scratch, plane + h * p_.input.h);
    }
  }

  void run_line(int64_t rows, int64_t first, const Scratch& scratch, T* to) const {
    for (int64_t phase = 0; phase < p_.stride_w; ++phase) {
      A* part = scratch.parts + phase * width_;
      for (int64_t j = 0; j < width_; j += kLanes<A>) {
        Vec<A> sum{};
        for (int64_t x = 0; x < rows; ++x) {
          const int64_t line = (scratch.rows[x].index - first) * columns_ + j;
          const int64_t place = scratch.rows[x].tap * p_.S;
          for (int64_t t = first_tap_[phase]; t < first_tap_[phase + 1]; ++t) {
            const int64_t at = line + taps_[t].index;
            const Places<A> taken =
                load(scratch.places + at) == same_places<A>(place + taps_[t].tap);
            sum += taken ? load(scratch.grads + at) : Vec<A>{};
          }
        }
        store<A>(part + j, sum);
      }
    }
    A* line = scratch.line;
    bool in_place = false;
    if constexpr (kSame<T, A>) {
      in_place = p_.input.w == 1;
      if (in_place) line = to;
    }
    join_phases(scratch.parts, width_, p_.stride_w, line, p_.W);
    if (!in_place) copy_narrowed(line, p_.W, to, p_.input.w);
  }

  const MaxPool2dProblem& p_;
  const T* from_;
  const I* argmax_;
  T* to_;
  int threads_;
  int64_t left_, width_, columns_, band_, band_windows_;
  int64_t* first_tap_;  // [stride_w + 1] where the taps of a phase begin
  Window* taps_;        // [S] the column of the window that the first pixel of the phase lies in
};

// kVectors vectors of channels of one pixel.
template <int kVectors, typename T, typename I>
GDFAST_INLINE void gather_channels(const MaxPool2dProblem& p, const T* grads, const I* places,
                                   const Window* rows, int64_t row_count, const Window* columns,
                                   int64_t column_count, T* to) {
  using A = typename Accumulator<T>::type;
  Vec<A> sum[kVectors] = {};
  for (int64_t x = 0; x < row_count; ++x) {
    for (int64_t y = 0; y < column_count; ++y) {
      const T* grad = grads + rows[x].index * p.output.h + columns[y].index * p.output.w;
      const I* place = places + rows[x].index * p.argmax.h + columns[y].index * p.argmax.w;
      const Places<A> wanted = same_places<A>(rows[x].tap * p.S + columns[y].tap);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const Places<A> taken = load_places<A>(place + v * kLanes<A>) == wanted;
        sum[v] += taken ? load_widened<A>(grad + v * kLanes<A>) : Vec<A>{};
      }
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) store_narrowed<A>(to + v * kLanes<A>, sum[v]);
}

template <typename T, typename I>
void run_channel_lines(const MaxPool2dProblem& p, const T* grad_output, const I* argmax,
                       T* grad_input, int threads) {
  constexpr int64_t kVector = kLanes<typename Accumulator<T>::type>;
  Window* columns = nullptr;
  int64_t* column_counts = nullptr;
  const auto carve_rows = [&](Carver& carver) { return carver.template take<Window>(p.R); };
  const ThreadScratch memory(
      threads,
      [&](Carver& carver) {
        columns = carver.template take<Window>(p.W * p.S);
        column_counts = carver.template take<int64_t>(p.W);
      },
      carve_rows);
  for (int64_t w = 0; w < p.W; ++w) {
    column_counts[w] =
        windows_of(w, p.pad_w, p.stride_w, p.dilation_w, p.S, p.Q, columns + w * p.S);
  }
  const int64_t lines = max_of(1, kTaskValues / (p.W * p.C));
  parallel_for(ceil_div(p.N * p.H, lines), threads, [&](int64_t task, int thread) {
    Carver own = memory.of(thread);
    Window* rows = carve_rows(own);
    for (int64_t line = task * lines; line < min_of(p.N * p.H, (task + 1) * lines); ++line) {
      const int64_t n = line / p.H, h = line % p.H;
      const int64_t row_count = windows_of(h, p.pad_h, p.stride_h, p.dilation_h, p.R, p.P, rows);
      const T* grads = grad_output + n * p.output.n;
      const I* places = argmax + n * p.argmax.n;
      T* to = grad_input + n * p.input.n + h * p.input.h;
      for (int64_t w = 0; w < p.W; ++w, to += p.input.w) {
        const auto gather = [&](auto vectors, int64_t c) {
          gather_channels<decltype(vectors)::value>(p, grads + c, places + c, rows, row_count,
                                                    columns + w * p.S, column_counts[w], to + c);
        };
        int64_t c = 0;
        for (; c + 4 * kVector <= p.C; c += 4 * kVector) {
          gather(std::integral_constant<int, 4>{}, c);
        }
        for (; c < p.C; c += kVector) {
          // The last vector ends at the last channel, and computes some channels again.
          gather(std::integral_constant<int, 1>{}, min_of(c, p.C - kVector));
        }
      }
    }
  });
}

}  // namespace

void max_pool2d_grad(const MaxPool2dProblem& problem, const void* grad_output, const void* argmax,
                     void* grad_input, int threads) {
  if (problem.N * problem.C == 0) return;
  with_dtype(problem.dtype, [&](auto element) {
    using T = decltype(element);
    with_place_type(problem, [&](auto place) {
      using I = decltype(place);
      const bool lines = problem.input.c == 1 && problem.output.c == 1 && problem.argmax.c == 1 &&
                         problem.C >= kLanes<typename Accumulator<T>::type>;
      const auto* from = static_cast<const T*>(grad_output);
      const auto* places = static_cast<const I*>(argmax);
      auto* to = static_cast<T*>(grad_input);
      if (lines) {
        run_channel_lines(problem, from, places, to, threads);
      } else {
        Planes<T, I>(problem, from, places, to, threads).run();
      }
    });
  });
}

}  // namespace gdfast::cpu::GDFAST_ISA
