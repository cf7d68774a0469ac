// grad_weight by Winograd's way through a dense 3x3 kernel with stride 2; see
// winograd_stride2_transforms.h:
//
//   filters[f] = sum over products of filter f and tiles of image[product] * grads[its sum]
//   grad_weight = the 25 filters, transformed back
//
// The reduction runs over the tiles:
//   image   [channels / 16][49][tiles][16]           rows of a tile of the product: channels
//   grads   [panel][25][tiles][width]                its columns: outputs
//   filters [25][channels][width]
//
// Many channels: winograd_grad_weight_rounds.h. Few, and the layout above: each thread owns a share
// of the tiles and goes through it block by block, image and grads staying in L2; the shares are
// added up in their order.
#pragma once

#include "winograd_grad_filters.h"
#include "winograd_grad_weight_rounds.h"
#include "winograd_stride2.h"

namespace gdfast::cpu {
namespace {

struct Stride2GradFilterTransform {
  GDFAST_INLINE static void apply(const Vec<float>* in, int in_step, Vec<float>* out,
                                  int out_step) {
    transform_stride2_grad_filter<float>(in, in_step, out, out_step);
  }
};

// What GradWeightRounds asks for.
struct Stride2GradWeight {
  using T = float;
  using Grid = TileGridOf<Stride2::kOut>;
  using Reader = TileReader<2 * Stride2::kOut + 1, Stride2::kOut, 2>;
  using GradReader = TileReader<Stride2::kOut, Stride2::kOut>;
  using Filters = GradFilters<Stride2::kAxisFilters, Stride2GradFilterTransform>;
  static constexpr int kProducts = Stride2::kProducts, kSums = Stride2::kSums;
  static constexpr int kFilters = Stride2::kFilters;
  static constexpr int64_t kStageSize = Reader::kStageSize;
  // Products in the order of their filters, which is that of the image.
  static constexpr Stride2Order kOrder{Stride2::kFilterOf, Stride2::kAxisFilters, 0};

  // The products that a filter adds up.
  struct Term {
    int product, sum;
    bool last_row, last_column;  // whether it is that of the last row and column of outputs alone
  };
  static int terms(int filter) { return kOrder.products[filter]; }
  static Term term(int filter, int x) {
    const int place = kOrder.first[filter] + x, product = kOrder.product[place];
    const int i = product / Stride2::kAxis, j = product % Stride2::kAxis;
    return {place, Stride2::kSumOf[i] * Stride2::kAxisSums + Stride2::kSumOf[j],
            i >= Stride2::kLastProduct, j >= Stride2::kLastProduct};
  }

  static Reader reader(const Conv2dProblem& p, const Grid& grid, const T* input) {
    return Reader(grid, input, p.input, p.C / p.groups, p.H, p.W, -p.pad_h, -p.pad_w);
  }
  static GradReader grad_reader(const Conv2dProblem& p, const Grid& grid, const T* grad_output,
                                int64_t outputs) {
    return GradReader(grid, grad_output, p.output, outputs, p.P, p.Q, 0, 0);
  }

  // The image of the tiles [first, end) of a group: to(c, tile)[product * product_step], for whole
  // vectors of channels.
  template <bool kStream, typename To>
  static void transform_input(const Conv2dProblem& p, const Grid& grid, const T* input,
                              int64_t first, int64_t end, const T* zeros, T* stage, int64_t,
                              int64_t product_step, const To& to) {
    reader(p, grid, input)
        .read<4>(first, end, zeros, stage,
                 [&](const T* const* from, int64_t offset, int64_t c, int64_t tile) {
                   T* line = to(c, tile);
                   transform_stride2_tile<2>(
                       from, offset, 1, 1, [&](int product, Vec<T> value) GDFAST_INLINE_LAMBDA {
                         put_vector(line + kOrder.place[product] * product_step, value, kStream);
                       });
                 });
  }

  // The 25 sums of some outputs, transposed, and the plain ones for the bias.
  template <bool kStream, typename To>
  static void transform_grads(const Conv2dProblem& p, const Grid& grid, const T* grad_output,
                              int64_t outputs, int64_t first, int64_t end, const T* zeros, T* stage,
                              int64_t, int64_t sum_step, const To& to, T* bias_sums) {
    constexpr int kOut = Stride2::kOut, kAxis = Stride2::kAxisSums;
    grad_reader(p, grid, grad_output, outputs)
        .read(first, end, zeros, stage,
              [&](const T* const* from, int64_t offset, int64_t k, int64_t tile) {
                T* line = to(k, tile);
                Vec<T> half[kAxis * kOut], total{};
#pragma GCC unroll 3
                for (int j = 0; j < kOut; ++j) {
                  Vec<T> column[kOut];
#pragma GCC unroll 3
                  for (int i = 0; i < kOut; ++i) {
                    column[i] = load(from[i * kOut + j] + offset);
                    total += column[i];
                  }
                  transform_stride2_grads<T>(column, 1, half + j, kOut);
                }
                store<T>(bias_sums + k, load(bias_sums + k) + total);
#pragma GCC unroll 5
                for (int i = 0; i < kAxis; ++i) {
                  Vec<T> sums[kAxis];
                  transform_stride2_grads<T>(half + i * kOut, 1, sums, 1);
#pragma GCC unroll 5
                  for (int j = 0; j < kAxis; ++j) {
                    put_vector(line + (i * kAxis + j) * sum_step, sums[j], kStream);
                  }
                }
              });
  }
};

class Stride2GradWeightShares {
  using T = float;
  static constexpr int kWidth = kLanes<T>;
  using Pass = Stride2GradWeight;
  using Grid = Pass::Grid;
  static constexpr int kProducts = Stride2::kProducts, kFilters = Stride2::kFilters;
  // Tiles that one product runs over at once: their panel is 16 to 32 KB, in L1.
  static constexpr int64_t kStepTiles = kVectorRegisters == 32 ? 128 : 256;
  static constexpr int64_t kGroup = 16;  // channels whose image lies side by side
  using Filters = Pass::Filters;
  static constexpr int64_t kTaskChannels = Filters::kTaskChannels;

 public:
  static bool fits(const Conv2dProblem& p) {
    return round_up(p.C / p.groups, kWidth) * (p.K / p.groups) <= 64 * 64;
  }

  Stride2GradWeightShares(const Conv2dProblem& p, const T* grad_output, const T* input,
                          T* grad_weight, T* grad_bias, int threads)
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
    // Image and grads of a block take about 800 KB; 400 on AVX-512, where 1 MB of L2 holds the next
    // ones too.
    const int64_t most = max_of(24, (kVectorRegisters == 32 ? 102400 : 204800) /
                                        (kProducts * channels_ + Stride2::kSums * panels_.width));
    shares_ = max_of(1, min_of(threads, grid_.count / 4));
    const int64_t share_tiles = ceil_div(grid_.count, shares_);
    block_tiles_ = max_of(1, ceil_div(share_tiles, ceil_div(share_tiles, most)));
    tile_step_ = padded_tiles(block_tiles_);
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
    MemoryAhead::Stretch* ahead;
  };

  // Zeros stand for the channels of a pixel outside.
  int64_t zeros_size() const { return max_of(channels_, panels_.count * panels_.width); }
  // Of one group of channels.
  int64_t image_size() const { return kGroup * kProducts * tile_step_; }
  int64_t grads_size() const { return Stride2::kSums * tile_step_ * panels_.width; }
  // From the sums of one filter to those of the next; odd lines again.
  int64_t sums_step() const { return rows_ * panels_.width + kWidth; }
  int64_t sums_size() const { return kFilters * sums_step(); }

  int64_t carve(Carver carver) {
    const int64_t outputs = panels_.count * panels_.width;
    zeros_ = carver.take<T>(zeros_size());
    bias_sums_ = carver.take<T>(shares_ * outputs);
    share_sums_ = carver.take<T>(shares_ * panels_.count * sums_size());
    const int64_t before = carver.used();
    scratch_.image = carver.take<T>(ceil_div(channels_, kGroup) * image_size());
    scratch_.grads = carver.take<T>(grads_size());
    scratch_.lines = carver.take<T>(kTaskChannels * 9 * panels_.width);
    scratch_.stage = carver.take<T>(Pass::kStageSize);
    scratch_.ahead =
        carver.take<MemoryAhead::Stretch>(block_tiles_ * (Pass::Reader::kRows + Stride2::kOut));
    scratch_bytes_ = carver.used() - before;
    return before + scratch_bytes_ * threads_;
  }

  Scratch scratch_of(int thread) const {
    const auto move = [&](auto* part) {
      return reinterpret_cast<decltype(part)>(reinterpret_cast<uintptr_t>(part) +
                                              scratch_bytes_ * thread);
    };
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
      for (int64_t first = begin; first < end; first += block_tiles_) {
        const int64_t last = min_of(first + block_tiles_, end);
        MemoryAhead ahead(scratch.ahead);
        add_ahead(group, last, min_of(last + block_tiles_, end), ahead);
        // Calls of at least half a group of channels, which fetch every 16 tiles.
        ahead.spread(kProducts * panels_.count * (channels_ / 8) * ((last - first) / 16));
        transform_input(group, first, last, scratch.stage, scratch.image);
        for (int64_t panel = 0; panel < panels_.count; ++panel) {
          transform_grads(group, panel, first, last, scratch.stage, scratch.grads,
                          bias_sums + panel * panels_.width);
          multiply(scratch.image, scratch.grads, first, last - first, first > begin, ahead,
                   sums + panel * sums_size());
        }
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

  // What the transforms of tiles [first, end) see.
  void add_ahead(int64_t group, int64_t first, int64_t end, MemoryAhead& to) const {
    Pass::reader(p_, grid_, input_ + group * reduced_ * p_.input.c).ahead(first, end, to);
    Pass::grad_reader(p_, grid_, grad_output_ + group * produced_ * p_.output.c, produced_)
        .ahead(first, end, to);
  }

  void transform_input(int64_t group, int64_t first, int64_t end, T* stage, T* to) const {
    Pass::template transform_input<false>(
        p_, grid_, input_ + group * reduced_ * p_.input.c, first, end, zeros_, stage, kGroup,
        tile_step_ * kGroup, [&](int64_t c, int64_t tile) {
          return to + c / kGroup * image_size() + (tile - first) * kGroup + c % kGroup;
        });
  }

  void transform_grads(int64_t group, int64_t panel, int64_t first, int64_t end, T* stage, T* to,
                       T* bias_sums) const {
    const int64_t output = panel * panels_.width, sum_step = tile_step_ * panels_.width;
    Pass::template transform_grads<false>(
        p_, grid_, grad_output_ + (group * produced_ + output) * p_.output.c,
        min_of(panels_.width, produced_ - output), first, end, zeros_, stage, panels_.width,
        sum_step, [&](int64_t k, int64_t tile) { return to + (tile - first) * panels_.width + k; },
        bias_sums);
    // Lanes past the last output were never read: their products must not be left to chance.
    const int64_t valid = round_up(min_of(panels_.width, produced_ - output), kWidth);
    for (int64_t k = valid; k < panels_.width; k += kWidth) {
      for (int64_t tile = 0; tile < end - first; ++tile) {
        for (int x = 0; x < Stride2::kSums; ++x) {
          store<T>(to + tile * panels_.width + k + x * sum_step, Vec<T>{});
        }
      }
    }
  }

  // filters[filter][channel] (+)= image times grads, over those of tiles [first, first + tiles)
  // that need each product; image and grads begin with tile `first`.
  void multiply(const T* image, const T* grads, int64_t first, int64_t tiles, bool accumulate,
                MemoryAhead& ahead, T* filters) const {
    const int64_t width = panels_.width;
    for (int filter = 0; filter < kFilters; ++filter, filters += sums_step()) {
      bool started = accumulate;
      const auto run = [&](int place, int sum, int64_t tile, int64_t count) {
        for (int64_t c = 0; c < channels_; c += kGroup) {
          const T* rows = image + c / kGroup * image_size() + (place * tile_step_ + tile) * kGroup;
          with_vectors(panels_.vectors, [&](auto vectors) {
            multiply_stride2_grads<vectors.value>(min_of(kGroup, channels_ - c), rows, kGroup,
                                                  grads + (sum * tile_step_ + tile) * width, count,
                                                  started, ahead, filters + c * width);
          });
        }
        started = true;
      };
      for (int x = 0; x < Pass::terms(filter); ++x) {
        const Pass::Term term = Pass::term(filter, x);
        for (const TileRange& range : grid_.needing(term.last_row, term.last_column).part) {
          const TileRange own = range.within(first, first + tiles);
          for (int64_t tile = own.begin; tile < own.end; tile += kStepTiles) {
            run(term.product, term.sum, tile - first, min_of(kStepTiles, own.end - tile));
          }
        }
      }
      if (!started) run(0, 0, 0, 0);  // no tile needs it: it is zero
    }
  }

  void write_bias(int64_t group) {
    const int64_t outputs = panels_.count * panels_.width;
    for (int64_t part = 1; part < shares_; ++part) {
      for (int64_t k = 0; k < produced_; ++k) bias_sums_[k] += bias_sums_[part * outputs + k];
    }
    copy_narrowed(bias_sums_, produced_, grad_bias_ + group * produced_, 1);
  }

  const Conv2dProblem& p_;
  const T* grad_output_;
  const T* input_;
  T* grad_bias_;
  int threads_;
  int64_t reduced_, produced_;  // channels of a group
  Grid grid_;
  Panels<T> panels_;
  Filters filters_;
  int64_t channels_, rows_;  // reduced ones, padded to whole vectors and to whole tasks
  int64_t shares_, block_tiles_;
  int64_t tile_step_;
  T* zeros_;
  T* bias_sums_;   // [share][outputs]
  T* share_sums_;  // [share][panel][25][rows][width]
  Scratch scratch_;
  int64_t scratch_bytes_;
};

// grad_weight of p, which winograd_stride2_fits, and grad_bias where it is not null.
inline void run_stride2_grad_weight(const Conv2dProblem& p, const float* grad_output,
                                    const float* input, float* grad_weight, float* grad_bias,
                                    int threads) {
  if (Stride2GradWeightShares::fits(p)) {
    Stride2GradWeightShares(p, grad_output, input, grad_weight, grad_bias, threads).run();
  } else {
    GradWeightRounds<Stride2GradWeight>(p, grad_output, input, grad_weight, grad_bias, threads)
        .run();
  }
}

}  // namespace
}  // namespace gdfast::cpu
