// conv2d_grad_weight with few input channels: vectors run over the output channels.
//
// The rows (c, r, s) of the result are so few that a tile holds as many of them as the registers
// do, and is walked through all pixels of some lines at once. They come in runs of kRun that lie
// side by side in a copy of the image: a run is one pointer. A task owns a panel of k and a share
// of the output's lines; shares are added up afterwards in a fixed order.
#pragma once

#include "source_lines.h"
#include "tile.h"
#include "weight_rows.h"

namespace gdfast::cpu {
namespace {

constexpr int kRun = 3;
constexpr int64_t kCacheLine = 64;

// Runs of a tile by the vectors of its panel: 9 x 3 x 1, 4 x 3 x 2, 3 x 3 x 3 and 2 x 3 x 4 take 24
// to 27 accumulators of 32 registers; 4 x 3 x 1 and 2 x 3 x 2 take 12 of 16.
constexpr int most_runs(int vectors) {
  constexpr int kWide[] = {9, 4, 3, 2}, kNarrow[] = {4, 2, 1, 1};
  return kVectorRegisters == 32 ? kWide[vectors - 1] : kNarrow[vectors - 1];
}

// Those of a smaller tile, for what is left over, or for all where it divides them evenly.
constexpr int few_runs(int vectors) { return most_runs(vectors) >= 4 ? 3 : 1; }

template <typename A>
struct RunTileArgs {
  const A* image;       // of the first pixel of the first line
  const int64_t* runs;  // offsets of kRuns runs
  int64_t line_step, pixel_step;
  const A* panel;  // [lines][pixels] of kVectors whole vectors
  int64_t panel_line, panel_step;
  int64_t lines, pixels;
  const char* ahead;  // a cache line for each pixel, to be fetched meanwhile
  A* sums;            // [kRuns * kRun][kVectors whole vectors]
  bool first;         // whether to write sums rather than add to them
};

template <typename A, int kRuns, int kVectors>
void multiply_runs(const RunTileArgs<A>& args) {
  constexpr int kWidth = kLanes<A>;
  Vec<A> sum[kRuns * kRun][kVectors] = {};
  const int64_t pixel_step = args.pixel_step, panel_step = args.panel_step;
  const char* ahead = args.ahead;
  for (int64_t l = 0; l < args.lines; ++l) {
    const A* run[kRuns];
#pragma GCC unroll 9
    for (int b = 0; b < kRuns; ++b) run[b] = args.image + l * args.line_step + args.runs[b];
    const A* panel = args.panel + l * args.panel_line;
    int64_t at = 0;
    for (int64_t x = 0; x < args.pixels;
         ++x, at += pixel_step, panel += panel_step, ahead += kCacheLine) {
      __builtin_prefetch(ahead, 0, 2);
      Vec<A> line[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) line[v] = load(panel + v * kWidth);
#pragma GCC unroll 9
      for (int b = 0; b < kRuns; ++b) {
#pragma GCC unroll 3
        for (int i = 0; i < kRun; ++i) {
          Vec<A> value = broadcast(run[b][at + i]);
          if constexpr (kVectors > 1) keep_in_register<A>(value);
#pragma GCC unroll 4
          for (int v = 0; v < kVectors; ++v) sum[b * kRun + i][v] += value * line[v];
        }
      }
    }
  }
  A* sums = args.sums;
  const bool first = args.first;
#pragma GCC unroll 27
  for (int i = 0; i < kRuns * kRun; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v, sums += kWidth) {
      store<A>(sums, first ? sum[i][v] : load(sums) + sum[i][v]);
    }
  }
}

template <typename A, int kVectors>
GDFAST_INLINE void multiply_runs(int runs, const RunTileArgs<A>& args) {
  if (runs == most_runs(kVectors)) {
    multiply_runs<A, most_runs(kVectors), kVectors>(args);
  } else {
    multiply_runs<A, few_runs(kVectors), kVectors>(args);
  }
}

template <typename A>
GDFAST_INLINE void multiply_runs(int vectors, int runs, const RunTileArgs<A>& args) {
  switch (vectors) {
    case 1:
      return multiply_runs<A, 1>(runs, args);
    case 2:
      return multiply_runs<A, 2>(runs, args);
#if defined(__AVX512F__)
    case 3:
      return multiply_runs<A, 3>(runs, args);
    case 4:
      return multiply_runs<A, 4>(runs, args);
#endif
  }
}

// sums[j] += the sum of the chunk's pixels, for `width` j in whole vectors. Several sums run side
// by side and are added up in pairs: one would wait for itself, and its error grow with each term.
template <typename A>
void add_pixels(const RunTileArgs<A>& chunk, int64_t width, A* sums) {
  constexpr int kParts = 8;
  for (int64_t j = 0; j < width; j += kLanes<A>) {
    Vec<A> part[kParts] = {};
    int next = 0;  // lines may be shorter than kParts
    for (int64_t l = 0; l < chunk.lines; ++l) {
      const A* line = chunk.panel + l * chunk.panel_line + j;
      int64_t x = 0;
      for (; x + kParts <= chunk.pixels; x += kParts, line += kParts * chunk.panel_step) {
#pragma GCC unroll 8
        for (int i = 0; i < kParts; ++i) part[i] += load(line + i * chunk.panel_step);
      }
      for (; x < chunk.pixels; ++x, line += chunk.panel_step, next = (next + 1) % kParts) {
        part[next] += load(line);
      }
    }
    for (int half = kParts / 2; half > 0; half /= 2) {
      for (int i = 0; i < half; ++i) part[i] += part[i + half];
    }
    store<A>(sums + j, load(sums + j) + part[0]);
  }
}

template <typename T>
class FewGradWeight {
  using A = typename Accumulator<T>::type;

 public:
  // conv is the forward pass of p.
  FewGradWeight(const Conv2dProblem& p, const TapConv& conv, const T* grad_output, const T* input,
                T* grad_weight, T* grad_bias, int threads)
      : p_(p),
        conv_(conv),
        grad_output_(grad_output),
        input_(input),
        grad_weight_(grad_weight),
        grad_bias_(grad_bias),
        threads_(threads),
        weight_rows_(p),
        interleaved_(p.input.c == 1 || conv.reduced == 1 || p.dilation_w > 1 || p.S % kRun != 0),
        image_lines_(conv, 1, interleaved_) {
    const int64_t vectors = ceil_div(conv.produced, kLanes<A>);
    panels_ = ceil_div(vectors, kMaxVectors);
    vectors_ = static_cast<int>(ceil_div(vectors, panels_));
    panels_ = ceil_div(vectors, vectors_);
    width_ = vectors_ * kLanes<A>;

    // Values side by side in the copy: all taps and channels of a line of the kernel, the channels
    // of a tap where taps are dilated, or the taps of one channel.
    const bool dense = p.dilation_w == 1 || p.S == 1;
    stretch_ = interleaved_ ? (dense ? p.S * conv.reduced : conv.reduced) : p.S;
    stretches_ = conv.reduced * p.R * p.S / stretch_;
    stretch_runs_ = ceil_div(stretch_, kRun);
    runs_ = stretches_ * stretch_runs_;
    const int most = most_runs(vectors_), few = few_runs(vectors_);
    tile_runs_ = runs_ <= few || (few > 1 && runs_ % most != 0 && runs_ % few == 0) ? few : most;

    panel_in_place_ = kSame<T, A> && p.output.c == 1 && conv.produced % width_ == 0;
    // A chunk's pixels are summed in registers: enough of them to be worth a pass over the sums,
    // few enough to keep the error small, and the panel in L1.
    const int64_t pixels = min_of(256, 28672 / (width_ * static_cast<int64_t>(sizeof(A))));
    lines_ = max_of(1, min_of(p.P, pixels / p.Q));
    lines_ = ceil_div(p.P, ceil_div(p.P, lines_));
    chunks_of_image_ = ceil_div(p.P, lines_);
    chunks_of_copy_ = 1;
    while (chunks_of_copy_ < chunks_of_image_ &&
           image_lines_.size((chunks_of_copy_ + 1) * lines_) * static_cast<int64_t>(sizeof(A)) <=
               kCopyBytes) {
      ++chunks_of_copy_;
    }
    const int64_t owners = p.groups * panels_;
    shares_ = min_of(p.N * chunks_of_image_, ceil_div(4 * threads, owners) * threads);
  }

  // Whether runs are mostly full; else there are better ways.
  bool fits() const {
    return 3 * stretch_ >= 2 * stretch_runs_ * kRun && image_bytes() <= kMostBytes;
  }

  void run() {
    Workspace workspace(carve(Carver()));
    carve(Carver(workspace.data()));
    for (int64_t run = 0; run < padded_runs(); ++run) run_offsets_[run] = run_offset(run);
    const int64_t owners = p_.groups * panels_;
    parallel_for(owners * shares_, threads_, [&](int64_t index, int thread) {
      task(index / shares_, index % shares_, thread);
    });
    parallel_for(owners, threads_, [&](int64_t owner, int) { write(owner); });
  }

 private:
  static constexpr int64_t kMostBytes = 1 << 18;
  // A copy serves several chunks, which see some lines of it twice.
  static constexpr int64_t kCopyBytes = 1 << 16;

  int64_t image_size() const { return image_lines_.size(chunks_of_copy_ * lines_) + kRun; }
  int64_t image_bytes() const { return image_size() * static_cast<int64_t>(sizeof(A)); }
  // With room for what the last tile computes in vain.
  int64_t padded_runs() const { return runs_ + tile_runs_; }
  int64_t sums_size() const { return padded_runs() * kRun * width_; }

  int64_t carve(Carver carver) {
    const int64_t owners = p_.groups * panels_;
    sums_ = carver.template take<A>(owners * shares_ * sums_size());
    bias_sums_ = carver.template take<A>(owners * shares_ * width_);
    run_offsets_ = carver.template take<int64_t>(padded_runs());
    rows_ = carver.template take<A>(owners * weight_rows_.count() * width_);
    const int64_t before = carver.used();
    image_ = carver.template take<A>(image_size());
    panel_ = carver.template take<A>(panel_in_place_ ? 0 : lines_ * p_.Q * width_);
    scratch_bytes_ = carver.used() - before;
    return before + scratch_bytes_ * threads_;
  }

  A* of_thread(A* part, int thread) const {
    return part + scratch_bytes_ / static_cast<int64_t>(sizeof(A)) * thread;
  }

  // The row of the value at `place` of a stretch.
  WeightRows::Row row_at(int64_t stretch, int64_t place) const {
    if (!interleaved_) return {stretch / p_.R, stretch % p_.R, place};
    const int64_t tap = stretch * (stretch_ / conv_.reduced) + place / conv_.reduced;
    return {place % conv_.reduced, tap / p_.S, tap % p_.S};
  }

  int64_t run_offset(int64_t run) const {
    const int64_t stretch = run / stretch_runs_;
    if (stretch >= stretches_) return 0;
    const WeightRows::Row row = row_at(stretch, run % stretch_runs_ * kRun);
    return image_lines_.offset_of(conv_.taps[row.r * p_.S + row.s], row.c);
  }

  void task(int64_t owner, int64_t share, int thread) {
    const int64_t group = owner / panels_, k = owner % panels_ * width_;
    A* image = of_thread(image_, thread);
    A* sums = sums_ + (owner * shares_ + share) * sums_size();
    A* bias_sums = bias_sums_ + (owner * shares_ + share) * width_;
    std::memset(bias_sums, 0, width_ * sizeof(A));
    const int64_t chunks = p_.N * chunks_of_image_;
    const int64_t begin = chunks * share / shares_, end = chunks * (share + 1) / shares_;
    if (begin == end) std::memset(sums, 0, sums_size() * sizeof(A));
    RunTileArgs<A> args;
    args.line_step = image_lines_.line_step();
    args.pixel_step = image_lines_.pixel_step();
    args.pixels = p_.Q;
    int64_t copied = 0, copied_lines = 0;
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t n = chunk / chunks_of_image_, line = chunk % chunks_of_image_ * lines_;
      args.lines = min_of(lines_, p_.P - line);
      args.first = chunk == begin;
      if (chunk == begin || chunk % chunks_of_image_ % chunks_of_copy_ == 0) {
        copied = line;
        const int64_t to_come = chunks_of_copy_ - chunk % chunks_of_image_ % chunks_of_copy_;
        copied_lines = min_of(min_of(end - chunk, to_come) * lines_, p_.P - line);
        image_lines_.copy(input_, n, group, line, copied_lines, image);
      }
      args.image = image + (line - copied) * args.line_step;
      point_panel(n, line, group * conv_.produced + k, min_of(width_, conv_.produced - k),
                  of_thread(panel_, thread), args);
      int tile = 0;
      for (int64_t run = 0; run < runs_; run += tile) {
        const int few = few_runs(vectors_);
        tile = runs_ - run <= few ? few : tile_runs_;
        args.runs = run_offsets_ + run;
        args.sums = sums + run * kRun * width_;
        args.ahead = reinterpret_cast<const char*>(args.panel);
        if (run == 0) {  // what the next copy is made of
          args.ahead =
              reinterpret_cast<const char*>(image_lines_.at(input_, n, group, line + copied_lines));
        }
        multiply_runs<A>(vectors_, tile, args);
      }
      if (grad_bias_ != nullptr) add_pixels(args, width_, bias_sums);
    }
  }

  // Points the tile to grad_output, or to a copy with k side by side.
  void point_panel(int64_t n, int64_t line, int64_t k, int64_t valid, A* copy,
                   RunTileArgs<A>& args) const {
    const T* grad = grad_output_ + n * p_.output.n + line * p_.output.h + k * p_.output.c;
    if constexpr (kSame<T, A>) {
      if (panel_in_place_) {
        args.panel = grad;
        args.panel_line = p_.output.h;
        args.panel_step = p_.output.w;
        return;
      }
    }
    args.panel = copy;
    args.panel_line = p_.Q * width_;
    args.panel_step = width_;
    for (int64_t l = 0; l < args.lines; ++l, grad += p_.output.h) {
      if (p_.output.w == 1 && p_.output.c != 1) {
        transpose_widened(grad, p_.output.c, p_.Q, valid, width_, copy, width_);
        copy += p_.Q * width_;
        continue;
      }
      for (int64_t q = 0; q < p_.Q; ++q, copy += width_) {
        copy_widened(grad + q * p_.output.w, p_.output.c, valid, copy);
        for (int64_t x = valid; x < width_; ++x) copy[x] = A(0);
      }
    }
  }

  // Adds up the shares, sorts the rows and writes them where they belong.
  void write(int64_t owner) {
    const int64_t group = owner / panels_, first = owner % panels_ * width_;
    const int64_t valid = min_of(width_, conv_.produced - first);
    const int64_t k = group * conv_.produced + first;
    A* rows = rows_ + owner * weight_rows_.count() * width_;
    const A* sums = sums_ + owner * shares_ * sums_size();
    for (int64_t stretch = 0; stretch < stretches_; ++stretch) {
      for (int64_t place = 0; place < stretch_; ++place) {
        A* row = rows + weight_rows_.number(row_at(stretch, place)) * width_;
        add_shares(sums + (stretch * stretch_runs_ * kRun + place) * width_, sums_size(), row);
      }
    }
    weight_rows_.write(rows, width_, valid, 0, weight_rows_.count(),
                       grad_weight_ + k * p_.weight.n);
    if (grad_bias_ == nullptr) return;
    add_shares(bias_sums_ + owner * shares_ * width_, width_, rows);
    copy_narrowed(rows, valid, grad_bias_ + k, 1);
  }

  void add_shares(const A* from, int64_t step, A* to) const {
    for (int64_t j = 0; j < width_; j += kLanes<A>) {
      Vec<A> sum = load(from + j);
      for (int64_t share = 1; share < shares_; ++share) sum += load(from + share * step + j);
      store<A>(to + j, sum);
    }
  }

  const Conv2dProblem& p_;
  const TapConv& conv_;
  const T* grad_output_;
  const T* input_;
  T* grad_weight_;
  T* grad_bias_;
  int threads_;
  WeightRows weight_rows_;
  bool interleaved_;
  SourceLines<T> image_lines_;
  int vectors_;
  int64_t width_, panels_;
  int64_t stretch_, stretches_, stretch_runs_;  // values side by side, how many such, runs of one
  int64_t runs_;                                // of all stretches
  int tile_runs_;
  bool panel_in_place_;
  int64_t lines_, chunks_of_image_, chunks_of_copy_, shares_;
  A* sums_;
  A* bias_sums_;
  A* rows_;
  int64_t* run_offsets_;
  A* image_;
  A* panel_;
  int64_t scratch_bytes_;
};

}  // namespace
}  // namespace gdfast::cpu
