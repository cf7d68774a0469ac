// grad_weight by Winograd's F(4x4, 3x3), for a dense 3x3 kernel with stride 1 and dilation 1:
//
//   grad_weight[k, c] = G^T [ sum over tiles of (B^T image[c] B) * (A grad_output[k] A^T) ] G
//
// The sum over tiles is 36 products of matrices whose reduction runs over the tiles: sums
// [36][channels][width], for each panel of outputs. Many channels: winograd_grad_weight_rounds.h.
// Few: each thread owns a share of the tiles and goes through it block by block, image
// [36][tiles][channels] and grads [36][tiles][outputs] staying in L2; the shares are added up in
// their order.
#pragma once

#include "tap_conv_pixels.h"
#include "winograd_ahead.h"
#include "winograd_grad_filters.h"
#include "winograd_grad_weight_rounds.h"
#include "winograd_products.h"
#include "winograd_runs.h"

namespace gdfast::cpu {
namespace {

template <typename T>
bool winograd_grad_weight_fits(const Conv2dProblem& p) {
  return kSame<T, float> && p.R == 3 && p.S == 3 && p.stride_h == 1 && p.stride_w == 1 &&
         p.dilation_h == 1 && p.dilation_w == 1;
}

struct GradFilterTransform {
  GDFAST_INLINE static void apply(const Vec<float>* in, int in_step, Vec<float>* out,
                                  int out_step) {
    transform_grad_filter<float>(in, in_step, out, out_step);
  }
};

// What GradWeightRounds asks for.
struct Stride1GradWeight {
  using T = float;
  using Grid = TileGrid;
  using Filters = GradFilters<kTileIn, GradFilterTransform>;
  static constexpr int kProducts = cpu::kProducts, kSums = kProducts, kFilters = kProducts;
  static constexpr int64_t kStageSize = RunReader<kTileIn>::kStageSize;

  // The products that a filter adds up.
  struct Term {
    int product, sum;
    bool last_row, last_column;  // whether it is that of the last row and column of outputs alone
  };
  static int terms(int) { return 1; }
  static Term term(int filter, int) {
    return {filter, filter, filter / kTileIn == kTileIn - 1, filter % kTileIn == kTileIn - 1};
  }

  // B^T x B of the tiles [first, end) of a group: to(c, tile)[product * product_step], for whole
  // vectors of channels, and tile_step from one tile to the next along a line; with kStream past
  // the caches.
  template <bool kStream, typename To>
  static void transform_input(const Conv2dProblem& p, const Grid& grid, const T* input,
                              int64_t first, int64_t end, const T* zeros, T* stage,
                              int64_t tile_step, int64_t product_step, const To& to) {
    const RunReader<kTileIn> reader(grid, input, p.input, p.C / p.groups, p.H, p.W, -p.pad_h,
                                    -p.pad_w);
    reader.read(first, end, zeros, stage, [&](const Run<kTileIn>& run, int64_t c, int64_t tile) {
      transform_image_run<kStream>(run, to(c, tile), tile_step, product_step);
    });
  }

  // A x A^T of some outputs, and their plain sums for the bias.
  template <bool kStream, typename To>
  static void transform_grads(const Conv2dProblem& p, const Grid& grid, const T* grad_output,
                              int64_t outputs, int64_t first, int64_t end, const T* zeros, T* stage,
                              int64_t tile_step, int64_t product_step, const To& to, T* bias_sums) {
    const RunReader<kTileOut> reader(grid, grad_output, p.output, outputs, p.P, p.Q, 0, 0);
    reader.read(first, end, zeros, stage, [&](const Run<kTileOut>& run, int64_t k, int64_t tile) {
      const Vec<T> total = transform_grad_run<kStream>(run, to(k, tile), tile_step, product_step);
      store<T>(bias_sums + k, load(bias_sums + k) + total);
    });
  }
};

class GradWeightShares {
  using T = float;
  static constexpr int kWidth = kLanes<T>;
  // Of image and grads of a block, where threads own shares.
  static constexpr int64_t kBlockBytes = 200 << 10;
  using Pass = Stride1GradWeight;
  using Filters = Pass::Filters;
  static constexpr int64_t kTaskChannels = Filters::kTaskChannels;

 public:
  static bool fits(const Conv2dProblem& p) {
    return round_up(p.C / p.groups, kWidth) * (p.K / p.groups) <= 128 * 128;
  }

  GradWeightShares(const Conv2dProblem& p, const T* grad_output, const T* input, T* grad_weight,
                   T* grad_bias, int threads)
      : p_(p),
        grad_output_(grad_output),
        input_(input),
        grad_bias_(grad_bias),
        threads_(threads),
        reduced_(p.C / p.groups),
        produced_(p.K / p.groups),
        grid_(p.N, p.P, p.Q),
        panels_(produced_),
        filters_(p, grad_weight),
        channels_(round_up(reduced_, kWidth)),
        rows_(round_up(channels_, kTaskChannels)) {
    // Sums that no L2 holds are read and written anew for every block: then fewer, larger ones.
    const bool sums_stay = kProducts * 4 * channels_ * produced_ <= kBlockBytes;
    const int64_t fit = kBlockBytes / (kProducts * 4) / (channels_ + outputs());
    const int64_t most = sums_stay ? max_of(24, fit) : 64;
    shares_ = max_of(1, min_of(threads, grid_.count / 4));
    const int64_t share_tiles = ceil_div(grid_.count, shares_);
    block_tiles_ = max_of(1, ceil_div(share_tiles, ceil_div(share_tiles, most)));
  }

  void run() {
    Workspace workspace(carve(Carver()));
    carve(Carver(workspace.data()));
    std::memset(zeros_, 0, zeros_size() * sizeof(T));
    for (int64_t group = 0; group < p_.groups; ++group) {
      run_by_shares(group);
      if (grad_bias_ != nullptr) write_bias(group);
    }
  }

 private:
  struct Scratch {
    T* image;  // of a block
    T* grads;
    T* lines;  // [kTaskChannels * 9][width], weights before they are written
    T* stage;
    const T** ahead;  // [2][block_tiles]: of the next input and grads, fetched meanwhile
  };

  // Zeros stand for the channels of a pixel outside.
  int64_t zeros_size() const { return max_of(channels_, outputs()); }
  int64_t outputs() const { return panels_.count * panels_.width; }
  // From one product of a block to the next: a cache line more than there is, so that the same
  // place of all products spreads over the cache.
  int64_t image_step() const { return block_tiles_ * channels_ + 16; }
  int64_t grads_step() const { return block_tiles_ * outputs() + 16; }
  // From the sums of one product to those of the next; odd lines again.
  int64_t sums_step() const { return rows_ * panels_.width + kWidth; }
  int64_t sums_size() const { return kProducts * sums_step(); }

  int64_t carve(Carver carver) {
    zeros_ = carver.take<T>(zeros_size());
    bias_sums_ = carver.take<T>(shares_ * outputs());
    share_sums_ = carver.take<T>(shares_ * panels_.count * sums_size());
    const int64_t before = carver.used();
    scratch_.image = carver.take<T>(kProducts * image_step());
    scratch_.grads = carver.take<T>(kProducts * grads_step());
    scratch_.lines = carver.take<T>(kTaskChannels * 9 * panels_.width);
    scratch_.stage = carver.take<T>(RunReader<kTileIn>::kStageSize);
    scratch_.ahead = carver.take<const T*>(2 * block_tiles_);
    scratch_bytes_ = carver.used() - before;
    return before + scratch_bytes_ * threads_;
  }

  Scratch scratch_of(int thread) const {
    const auto move = [&](auto* part) { return part + scratch_bytes_ / sizeof(*part) * thread; };
    return {move(scratch_.image), move(scratch_.grads), move(scratch_.lines), move(scratch_.stage),
            move(scratch_.ahead)};
  }

  void run_by_shares(int64_t group) {
    parallel_for(shares_, threads_, [&](int64_t share, int thread) {
      const Scratch scratch = scratch_of(thread);
      T* sums = share_sums_ + share * panels_.count * sums_size();
      T* bias_sums = bias_sums_ + share * panels_.count * panels_.width;
      std::memset(bias_sums, 0, panels_.count * panels_.width * sizeof(T));
      const int64_t begin = grid_.count * share / shares_;
      const int64_t end = grid_.count * (share + 1) / shares_;
      // Lanes past the last output: their products must not be left to chance.
      if (outputs() > round_up(produced_, kWidth)) {
        std::memset(scratch.grads, 0, kProducts * grads_step() * sizeof(T));
      }
      // The rows above were fetched for the tiles above.
      const TilesAhead next_input(grid_, input_ + group * reduced_ * p_.input.c, p_.input, reduced_,
                                  2 - p_.pad_h, 1 - p_.pad_w);
      const TilesAhead next_grads(grid_, grad_output_ + group * produced_ * p_.output.c, p_.output,
                                  produced_, 0, 0);
      for (int64_t first = begin; first < end; first += block_tiles_) {
        const int64_t last = min_of(first + block_tiles_, end);
        const auto image_at = [&](int64_t c, int64_t tile) {
          return scratch.image + (tile - first) * channels_ + c;
        };
        const auto grads_at = [&](int64_t k, int64_t tile) {
          return scratch.grads + (tile - first) * outputs() + k;
        };
        Pass::template transform_input<false>(p_, grid_, input_ + group * reduced_ * p_.input.c,
                                              first, last, zeros_, scratch.stage, channels_,
                                              image_step(), image_at);
        Pass::template transform_grads<false>(
            p_, grid_, grad_output_ + group * produced_ * p_.output.c, produced_, first, last,
            zeros_, scratch.stage, outputs(), grads_step(), grads_at, bias_sums);
        const int64_t next_last = min_of(last + block_tiles_, end);
        next_input.point(last, next_last, block_tiles_, scratch.ahead);
        next_grads.point(last, next_last, block_tiles_, scratch.ahead + block_tiles_);
        multiply_block(scratch, first, last - first, first > begin, next_input, next_grads, sums);
      }
    });
    parallel_for(panels_.count * (rows_ / kTaskChannels), threads_, [&](int64_t index, int thread) {
      const int64_t panel = index % panels_.count, c = index / panels_.count * kTaskChannels;
      T* sums = share_sums_ + panel * sums_size() + c * panels_.width;
      T* lines = scratch_of(thread).lines;
      filters_.transform_back(c, sums, sums_step(), shares_, panels_.count * sums_size(), false,
                              lines);
      filters_.write(group, panel, c, lines);
    });
  }

  // The products of a block of `tiles` tiles from `first` on: sums[panel][product][row] (+)= image
  // times grads, over those that need the product.
  void multiply_block(const Scratch& scratch, int64_t first, int64_t tiles, bool accumulate,
                      const TilesAhead& next_input, const TilesAhead& next_grads, T* sums) const {
    const int64_t width = panels_.width;
    const int64_t calls = ceil_div(channels_, channels_at_once(panels_.vectors));
    for (int product = 0; product < kProducts; ++product) {
      bool started = accumulate;
      const auto run = [&](int64_t tile, int64_t count) {
        const T* image = scratch.image + product * image_step() + tile * channels_;
        const T* grads = scratch.grads + product * grads_step() + tile * outputs();
        const Ahead ahead =
            ahead_of(product, next_input, next_grads, scratch.ahead + tile, block_tiles_);
        // The last calls fetch: the first ones have their operands to read from L2.
        int64_t line = panels_.count * calls;
        for (int64_t panel = 0; panel < panels_.count; ++panel) {
          T* to = sums + panel * sums_size() + product * sums_step();
          // 16 channels are 6 + 5 + 5, not 6 + 6 and a rest.
          for (int64_t call = 0; call < calls; ++call) {
            const int64_t c = channels_ * call / calls;
            multiply_tiles(channels_ * (call + 1) / calls - c, panels_.vectors, image + c,
                           channels_, grads + panel * width, outputs(), count, started,
                           ahead.line(--line), to + c * width);
          }
        }
        started = true;
      };
      for (const TileRange& range : grid_.needing(product).part) {
        const TileRange own = range.within(first, first + tiles);
        if (!own.empty()) run(own.begin - first, own.end - own.begin);
      }
      if (!started) run(0, 0);  // none needs it: the sums are zeros
    }
  }

  void write_bias(int64_t group) {
    for (int64_t part = 1; part < shares_; ++part) {
      for (int64_t k = 0; k < produced_; ++k) bias_sums_[k] += bias_sums_[part * outputs() + k];
    }
    copy_narrowed(bias_sums_, produced_, grad_bias_ + group * produced_, 1);
  }

  const Conv2dProblem& p_;
  const T* grad_output_;
  const T* input_;
  T* grad_bias_;
  int threads_;
  int64_t reduced_, produced_;  // channels of a group
  TileGrid grid_;
  Panels<T> panels_;
  Filters filters_;
  int64_t channels_, rows_;  // reduced ones, padded to whole vectors and to whole tasks
  int64_t shares_, block_tiles_;
  T* zeros_;
  T* bias_sums_;   // [share][outputs]
  T* share_sums_;  // [share][panel][36][rows][width]
  Scratch scratch_;
  int64_t scratch_bytes_;
};

// grad_weight of p, which winograd_grad_weight_fits, and grad_bias where it is not null.
inline void run_winograd_grad_weight(const Conv2dProblem& p, const float* grad_output,
                                     const float* input, float* grad_weight, float* grad_bias,
                                     int threads) {
  if (GradWeightShares::fits(p)) {
    GradWeightShares(p, grad_output, input, grad_weight, grad_bias, threads).run();
  } else {
    GradWeightRounds<Stride1GradWeight>(p, grad_output, input, grad_weight, grad_bias, threads)
        .run();
  }
}

}  // namespace
}  // namespace gdfast::cpu
