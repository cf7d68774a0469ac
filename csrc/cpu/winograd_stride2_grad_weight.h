// grad_weight by Winograd's way through a dense 3x3 kernel with stride 2; see
// winograd_stride2_transforms.h:
//
//   filters[f] = sum over products of filter f and tiles of image[product] * grads[its sum]
//   grad_weight = the 25 filters, transformed back
//
// The reduction runs over the tiles:
//   image   [channels / lanes][49][tiles][lanes]     rows of a tile of the product: channels
//   grads   [panel][25][tiles][width]                its columns: outputs
//   filters [25][channels][width]
//
// The two schedules are those of winograd_grad_weight.h: shares of tiles for few channels, blocks
// of channels for many.
#pragma once

#include "winograd_grad_filters.h"
#include "winograd_stride2.h"

namespace gdfast::cpu {
namespace {

struct Stride2GradFilterTransform {
  GDFAST_INLINE static void apply(const Vec<float>* in, int in_step, Vec<float>* out,
                                  int out_step) {
    transform_stride2_grad_filter<float>(in, in_step, out, out_step);
  }
};

class Stride2GradWeight {
  using T = float;
  static constexpr int kWidth = kLanes<T>;
  using Grid = TileGridOf<Stride2::kOut>;
  using Reader = TileReader<2 * Stride2::kOut + 1, Stride2::kOut, 2>;
  using GradReader = TileReader<Stride2::kOut, Stride2::kOut>;
  static constexpr int kProducts = Stride2::kProducts, kFilters = Stride2::kFilters;
  // Products in the order of their filters.
  static constexpr Stride2Order kOrder{Stride2::kFilterOf, Stride2::kAxisFilters, 0};
  // Tiles that one product runs over at once: their panel is 16 to 32 KB, in L1.
  static constexpr int64_t kStepTiles = kVectorRegisters == 32 ? 128 : 256;
  using Filters = GradFilters<Stride2::kAxisFilters, Stride2GradFilterTransform>;
  static constexpr int64_t kTaskChannels = Filters::kTaskChannels;

 public:
  Stride2GradWeight(const Conv2dProblem& p, const T* grad_output, const T* input, T* grad_weight,
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
    by_shares_ = channels_ * produced_ <= 64 * 64;
    const int64_t together = channels_ + panels_.count * panels_.width;
    // Image and grads of a block take about 800 KB.
    const int64_t most =
        by_shares_ ? max_of(24, 204800 / (kProducts * channels_ + Stride2::kSums * panels_.width))
                   : 64;
    shares_ = by_shares_ ? max_of(1, min_of(threads, grid_.count / 4)) : 1;
    round_tiles_ = by_shares_ ? grid_.count : image_round_tiles(grid_.count, together);
    rounds_ = ceil_div(grid_.count, round_tiles_);
    const int64_t share_tiles = ceil_div(round_tiles_, shares_);
    block_tiles_ = max_of(1, ceil_div(share_tiles, ceil_div(share_tiles, most)));
    blocks_ = ceil_div(round_tiles_, block_tiles_);
    tile_step_ = padded_tiles(by_shares_ ? block_tiles_ : round_tiles_);
  }

  void run() {
    Workspace workspace(carve(Carver()));
    carve(Carver(workspace.data()));
    std::memset(zeros_, 0, zeros_size() * sizeof(T));
    for (int64_t group = 0; group < p_.groups; ++group) {
      if (by_shares_) {
        run_by_shares(group);
      } else {
        for (int64_t round = 0; round < rounds_; ++round) run_by_channels(group, round);
      }
      if (grad_bias_ != nullptr) write_bias(group);
    }
  }

 private:
  struct Scratch {
    T* image;  // of a block, where threads own shares
    T* grads;
    T* sums;   // of a task, where tasks own channels
    T* lines;  // [kTaskChannels * 9][width], weights before they are written
    T* stage;
  };

  // Zeros stand for the channels of a pixel outside, and are what the rows of a tile start from.
  int64_t zeros_size() const {
    return max_of(kTileRows, max_of(channels_, panels_.count * panels_.width));
  }
  int64_t image_size() const { return channels_ * kProducts * tile_step_; }
  int64_t grads_size() const { return Stride2::kSums * tile_step_ * panels_.width; }
  // From the sums of one filter to those of the next; odd lines again.
  int64_t sums_step() const {
    return (by_shares_ ? rows_ : kTaskChannels) * panels_.width + kWidth;
  }
  int64_t sums_size() const { return kFilters * sums_step(); }
  int64_t bias_parts() const { return by_shares_ ? shares_ : rounds_ * blocks_; }

  int64_t carve(Carver carver) {
    const int64_t outputs = panels_.count * panels_.width;
    zeros_ = carver.take<T>(zeros_size());
    bias_sums_ = carver.take<T>(bias_parts() * outputs);
    share_sums_ = carver.take<T>(by_shares_ ? shares_ * panels_.count * sums_size() : 0);
    image_ = carver.take<T>(by_shares_ ? 0 : image_size());
    grads_ = carver.take<T>(by_shares_ ? 0 : panels_.count * grads_size());
    totals_ = carver.take<T>(rounds_ > 1 ? panels_.count * rows_ * 9 * panels_.width : 0);
    const int64_t before = carver.used();
    scratch_.image = carver.take<T>(by_shares_ ? image_size() : 0);
    scratch_.grads = carver.take<T>(by_shares_ ? grads_size() : 0);
    scratch_.sums = carver.take<T>(by_shares_ ? 0 : sums_size());
    scratch_.lines = carver.take<T>(kTaskChannels * 9 * panels_.width);
    scratch_.stage = carver.take<T>(Reader::kStageSize);
    scratch_bytes_ = carver.used() - before;
    return before + scratch_bytes_ * threads_;
  }

  Scratch scratch_of(int thread) const {
    const auto move = [&](T* part) { return part + scratch_bytes_ / sizeof(T) * thread; };
    return {move(scratch_.image), move(scratch_.grads), move(scratch_.sums), move(scratch_.lines),
            move(scratch_.stage)};
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
        transform_input(group, first, last, scratch.stage, scratch.image);
        for (int64_t panel = 0; panel < panels_.count; ++panel) {
          transform_grads(group, panel, first, last, scratch.stage, scratch.grads,
                          bias_sums + panel * panels_.width);
          multiply(scratch.image, scratch.grads, first, last - first, 0, channels_, first > begin,
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

  void run_by_channels(int64_t group, int64_t round) {
    const int64_t begin = round * round_tiles_;
    const int64_t tiles = min_of(round_tiles_, grid_.count - begin);
    parallel_for(blocks_ * (1 + panels_.count), threads_, [&](int64_t index, int thread) {
      const int64_t block = index / (1 + panels_.count);
      const int64_t panel = index % (1 + panels_.count) - 1;
      const int64_t first = min_of(block * block_tiles_, tiles);
      const int64_t end = min_of(first + block_tiles_, tiles);
      T* stage = scratch_of(thread).stage;
      if (panel < 0) {
        transform_input(group, begin + first, begin + end, stage, image_ + first * kWidth);
        return;
      }
      T* bias_sums =
          bias_sums_ + ((round * blocks_ + block) * panels_.count + panel) * panels_.width;
      std::memset(bias_sums, 0, panels_.width * sizeof(T));
      transform_grads(group, panel, begin + first, begin + end, stage,
                      grads_ + panel * grads_size() + first * panels_.width, bias_sums);
    });
    const int64_t tasks = ceil_div(channels_, kTaskChannels);
    parallel_for(panels_.count * tasks, threads_, [&](int64_t index, int thread) {
      const Scratch scratch = scratch_of(thread);
      const int64_t panel = index / tasks, c = index % tasks * kTaskChannels;
      multiply(image_, grads_ + panel * grads_size(), begin, tiles, c,
               min_of(kTaskChannels, channels_ - c), false, scratch.sums);
      T* lines = rounds_ > 1 ? totals_ + (panel * rows_ + c) * 9 * panels_.width : scratch.lines;
      filters_.transform_back(c, scratch.sums, sums_step(), 1, 0, round > 0, lines);
      if (round == rounds_ - 1) filters_.write(group, panel, c, lines);
    });
  }

  void transform_input(int64_t group, int64_t first, int64_t end, T* stage, T* to) const {
    const Reader reader(grid_, input_ + group * reduced_ * p_.input.c, p_.input, reduced_, p_.H,
                        p_.W, -p_.pad_h, -p_.pad_w);
    const int64_t product_step = tile_step_ * kWidth;
    reader.read<4>(first, end, zeros_, stage,
                   [&](const T* const* from, int64_t offset, int64_t c, int64_t tile) {
                     T* line = to + c * kProducts * tile_step_ + (tile - first) * kWidth;
                     transform_stride2_tile<2>(
                         from, offset, 1, 1, [&](int product, Vec<T> value) GDFAST_INLINE_LAMBDA {
                           store<T>(line + kOrder.place[product] * product_step, value);
                         });
                   });
  }

  // The 25 sums of the tiles of one panel's outputs, transposed, and the plain ones for the bias.
  void transform_grads(int64_t group, int64_t panel, int64_t first, int64_t end, T* stage, T* to,
                       T* bias_sums) const {
    constexpr int kOut = Stride2::kOut, kAxis = Stride2::kAxisSums;
    const int64_t output = panel * panels_.width;
    const GradReader reader(grid_, grad_output_ + (group * produced_ + output) * p_.output.c,
                            p_.output, min_of(panels_.width, produced_ - output), p_.P, p_.Q, 0, 0);
    const int64_t sum_step = tile_step_ * panels_.width;
    reader.read(first, end, zeros_, stage,
                [&](const T* const* from, int64_t offset, int64_t k, int64_t tile) {
                  T* line = to + (tile - first) * panels_.width + k;
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
                      store<T>(line + (i * kAxis + j) * sum_step, sums[j]);
                    }
                  }
                });
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

  // filters[filter][row] (+)= image of channel c + row times grads, over those of tiles [first,
  // first + tiles) that need each product; image and grads begin with tile `first`.
  void multiply(const T* image, const T* grads, int64_t first, int64_t tiles, int64_t c,
                int64_t channels, bool accumulate, T* filters) const {
    constexpr int kAxis = Stride2::kAxis;
    const int64_t width = panels_.width;
    TileArgs<T> args;
    args.row_step = kWidth;
    args.panel_step = width;
    args.segments = 1;
    args.start = zeros_;
    const T* rows[kTileRows];
    T* out[kTileRows];
    args.rows = rows;
    args.out = out;
    for (int filter = 0; filter < kFilters; ++filter) {
      bool started = accumulate;
      const auto run = [&](int place, int sum, int64_t tile, int64_t count) {
        args.panel = grads + (sum * tile_step_ + tile) * width;
        args.length = count;
        args.how = started ? Start::kAccumulate : Start::kRows;
        started = true;
        for (int64_t row = 0; row < channels; row += kTileRows) {
          for (int i = 0; i < kTileRows; ++i) {
            const int64_t channel = c + min_of(row + i, channels - 1);
            rows[i] = image +
                      ((channel / kWidth * kProducts + place) * tile_step_ + tile) * kWidth +
                      channel % kWidth;
            out[i] = filters + filter * sums_step() + (row + i) * width;
          }
          multiply_tile<T>(panels_.vectors, args);
        }
      };
      for (int x = 0; x < kOrder.products[filter]; ++x) {
        const int place = kOrder.first[filter] + x, product = kOrder.product[place];
        const int i = product / kAxis, j = product % kAxis;
        const int sum = Stride2::kSumOf[i] * Stride2::kAxisSums + Stride2::kSumOf[j];
        for (const TileRange& range :
             grid_.needing(i >= Stride2::kLastProduct, j >= Stride2::kLastProduct).part) {
          const TileRange own = range.within(first, first + tiles);
          for (int64_t tile = own.begin; tile < own.end; tile += kStepTiles) {
            run(place, sum, tile - first, min_of(kStepTiles, own.end - tile));
          }
        }
      }
      if (!started) run(0, 0, 0, 0);  // no tile needs it: it is zero
    }
  }

  void write_bias(int64_t group) {
    const int64_t outputs = panels_.count * panels_.width;
    for (int64_t part = 1; part < bias_parts(); ++part) {
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
  bool by_shares_;
  int64_t shares_, blocks_, block_tiles_;  // blocks of a round
  int64_t round_tiles_, rounds_;
  int64_t tile_step_;
  T* zeros_;
  T* bias_sums_;   // [part][outputs]
  T* share_sums_;  // [share][panel][25][rows][width]
  T* image_;
  T* grads_;
  T* totals_;  // [panel][rows * 9][width], where there are several rounds
  Scratch scratch_;
  int64_t scratch_bytes_;
};

}  // namespace
}  // namespace gdfast::cpu
