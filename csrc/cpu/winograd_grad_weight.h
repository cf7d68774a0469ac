// grad_weight by Winograd's F(4x4, 3x3), for a dense 3x3 kernel with stride 1 and dilation 1:
//
//   grad_weight[k, c] = G^T [ sum over tiles of (B^T image[c] B) * (A grad_output[k] A^T) ] G
//
// The sum over tiles is 36 products of matrices whose reduction runs over the tiles: sums
// [36][channels][width], for each panel of outputs. Two schedules.
//
// Few channels: each thread owns a share of the tiles and goes through it block by block, image
// [36][tiles][channels] and grads [36][tiles][outputs] staying in L2; the shares are added up in
// their order.
//
// Many channels: image [channels / lanes][36][tiles][lanes] and grads [panel][36][tiles][width] are
// transformed a round of tiles at a time, and a task owns some channels of a panel for all tiles of
// the round, so that its sums never leave L2. G^T x G being linear, rounds are added up as weights.
#pragma once

#include "tap_conv_pixels.h"
#include "winograd_ahead.h"
#include "winograd_grad_filters.h"
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

class WinogradGradWeight {
  using T = float;
  static constexpr int kWidth = kLanes<T>;
  // Of image and grads of a block, where threads own shares.
  static constexpr int64_t kBlockBytes = 200 << 10;
  // Tiles that one product runs over at once: their panel is 16 to 32 KB, in L1.
  static constexpr int64_t kStepTiles = kVectorRegisters == 32 ? 128 : 256;
  using Filters = GradFilters<kTileIn, GradFilterTransform>;
  static constexpr int64_t kTaskChannels = Filters::kTaskChannels;

 public:
  WinogradGradWeight(const Conv2dProblem& p, const T* grad_output, const T* input, T* grad_weight,
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
    by_shares_ = channels_ * produced_ <= 128 * 128;
    const int64_t together = channels_ + panels_.count * panels_.width;
    // Sums that no L2 holds are read and written anew for every block: then fewer, larger ones.
    const bool sums_stay = kProducts * 4 * channels_ * produced_ <= kBlockBytes;
    const int64_t most = sums_stay ? max_of(24, kBlockBytes / (kProducts * 4) / together) : 64;
    shares_ = by_shares_ ? max_of(1, min_of(threads, grid_.count / 4)) : 1;
    round_tiles_ = by_shares_ ? grid_.count : image_round_tiles(grid_.count, together);
    rounds_ = ceil_div(grid_.count, round_tiles_);
    const int64_t share_tiles = ceil_div(round_tiles_, shares_);
    block_tiles_ = max_of(1, ceil_div(share_tiles, ceil_div(share_tiles, most)));
    blocks_ = ceil_div(round_tiles_, block_tiles_);
    tile_step_ = padded_tiles(round_tiles_);
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
    const T** ahead;  // [2][block_tiles]: of the next input and grads, fetched meanwhile
  };

  // Zeros stand for the channels of a pixel outside, and are what the rows of a tile start from.
  int64_t zeros_size() const {
    return max_of(kTileRows, max_of(channels_, panels_.count * panels_.width));
  }
  int64_t outputs() const { return panels_.count * panels_.width; }
  // From one product of a block to the next: a cache line more than there is, so that the same
  // place of all products spreads over the cache.
  int64_t image_step() const { return block_tiles_ * channels_ + 16; }
  int64_t grads_step() const { return block_tiles_ * outputs() + 16; }
  int64_t image_size() const { return channels_ * kProducts * tile_step_; }
  int64_t grads_size() const { return kProducts * tile_step_ * panels_.width; }
  // From the sums of one product to those of the next; odd lines again.
  int64_t sums_step() const {
    return (by_shares_ ? rows_ : kTaskChannels) * panels_.width + kWidth;
  }
  int64_t sums_size() const { return kProducts * sums_step(); }
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
    scratch_.image = carver.take<T>(by_shares_ ? kProducts * image_step() : 0);
    scratch_.grads = carver.take<T>(by_shares_ ? kProducts * grads_step() : 0);
    scratch_.sums = carver.take<T>(by_shares_ ? 0 : sums_size());
    scratch_.lines = carver.take<T>(kTaskChannels * 9 * panels_.width);
    scratch_.stage = carver.take<T>(RunReader<kTileIn>::kStageSize);
    scratch_.ahead = carver.take<const T*>(by_shares_ ? 2 * block_tiles_ : 0);
    scratch_bytes_ = carver.used() - before;
    return before + scratch_bytes_ * threads_;
  }

  Scratch scratch_of(int thread) const {
    const auto move = [&](auto* part) { return part + scratch_bytes_ / sizeof(*part) * thread; };
    return {move(scratch_.image), move(scratch_.grads), move(scratch_.sums),
            move(scratch_.lines), move(scratch_.stage), move(scratch_.ahead)};
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
      const TilesAhead next_input(grid_, input_ + group * reduced_ * p_.input.c, p_.input, reduced_,
                                  1 - p_.pad_h, 1 - p_.pad_w);
      const TilesAhead next_grads(grid_, grad_output_ + group * produced_ * p_.output.c, p_.output,
                                  produced_, 0, 0);
      for (int64_t first = begin; first < end; first += block_tiles_) {
        const int64_t last = min_of(first + block_tiles_, end);
        transform_input(group, first, last, scratch.stage, scratch.image, channels_, kWidth,
                        image_step());
        transform_grads(group, 0, produced_, first, last, scratch.stage, scratch.grads, outputs(),
                        grads_step(), bias_sums);
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
        transform_input(group, begin + first, begin + end, stage, image_ + first * kWidth, kWidth,
                        kProducts * tile_step_ * kWidth, tile_step_ * kWidth);
        return;
      }
      T* bias_sums =
          bias_sums_ + ((round * blocks_ + block) * panels_.count + panel) * panels_.width;
      std::memset(bias_sums, 0, panels_.width * sizeof(T));
      const int64_t output = panel * panels_.width;
      const int64_t own = min_of(panels_.width, produced_ - output);
      T* to = grads_ + panel * grads_size() + first * panels_.width;
      const int64_t product_step = tile_step_ * panels_.width;
      transform_grads(group, output, own, begin + first, begin + end, stage, to, panels_.width,
                      product_step, bias_sums);
      // Lanes past the last output: their products must not be left to chance.
      for (int64_t k = round_up(own, kWidth); k < panels_.width; k += kWidth) {
        for (int64_t tile = 0; tile < end - first; ++tile) {
          for (int x = 0; x < kProducts; ++x) {
            store<T>(to + tile * panels_.width + k + x * product_step, Vec<T>{});
          }
        }
      }
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

  // A vector of channels goes to `to` + its number * vector_step.
  void transform_input(int64_t group, int64_t first, int64_t end, T* stage, T* to,
                       int64_t tile_step, int64_t vector_step, int64_t product_step) const {
    const RunReader<kTileIn> reader(grid_, input_ + group * reduced_ * p_.input.c, p_.input,
                                    reduced_, p_.H, p_.W, -p_.pad_h, -p_.pad_w);
    reader.read(first, end, zeros_, stage, [&](const Run<kTileIn>& run, int64_t c, int64_t tile) {
      transform_image_run(run, to + (tile - first) * tile_step + c / kWidth * vector_step,
                          tile_step, product_step);
    });
  }

  // A x A^T of some outputs of the tiles, and their plain sums for the bias.
  void transform_grads(int64_t group, int64_t output, int64_t outputs, int64_t first, int64_t end,
                       T* stage, T* to, int64_t tile_step, int64_t product_step,
                       T* bias_sums) const {
    const RunReader<kTileOut> reader(grid_,
                                     grad_output_ + (group * produced_ + output) * p_.output.c,
                                     p_.output, outputs, p_.P, p_.Q, 0, 0);
    reader.read(first, end, zeros_, stage, [&](const Run<kTileOut>& run, int64_t k, int64_t tile) {
      const Vec<T> total =
          transform_grad_run(run, to + (tile - first) * tile_step + k, tile_step, product_step);
      store<T>(bias_sums + k, load(bias_sums + k) + total);
    });
  }

  // The products of a block of `tiles` tiles from `first` on: sums[panel][product][row] (+)= image
  // times grads, over those that need the product.
  void multiply_block(const Scratch& scratch, int64_t first, int64_t tiles, bool accumulate,
                      const TilesAhead& next_input, const TilesAhead& next_grads, T* sums) const {
    const int64_t width = panels_.width;
    const int64_t calls = ceil_div(channels_, kTileRows);
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

  // sums[product][row] (+)= image of channel c + row times grads, over those of tiles [first, first
  // + tiles) that need the product; image and grads begin with tile `first`.
  void multiply(const T* image, const T* grads, int64_t first, int64_t tiles, int64_t c,
                int64_t channels, bool accumulate, T* sums) const {
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
    for (int product = 0; product < kProducts; ++product) {
      bool started = accumulate;
      const auto run = [&](int64_t tile, int64_t count) {
        args.panel = grads + (product * tile_step_ + tile) * width;
        args.length = count;
        args.how = started ? Start::kAccumulate : Start::kRows;
        started = true;
        for (int64_t row = 0; row < channels; row += kTileRows) {
          for (int i = 0; i < kTileRows; ++i) {
            const int64_t channel = c + min_of(row + i, channels - 1);
            rows[i] = image +
                      ((channel / kWidth * kProducts + product) * tile_step_ + tile) * kWidth +
                      channel % kWidth;
            out[i] = sums + product * sums_step() + (row + i) * width;
          }
          multiply_tile<T>(panels_.vectors, args);
        }
      };
      for (const TileRange& range : grid_.needing(product).part) {
        const TileRange own = range.within(first, first + tiles);
        for (int64_t tile = own.begin; tile < own.end; tile += kStepTiles) {
          run(tile - first, min_of(kStepTiles, own.end - tile));
        }
      }
      if (!started) run(0, 0);  // none needs it: the sums are zeros
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
  TileGrid grid_;
  Panels<T> panels_;
  Filters filters_;
  int64_t channels_, rows_;  // reduced ones, padded to whole vectors and to whole tasks
  bool by_shares_;
  int64_t shares_, blocks_, block_tiles_;  // blocks of a round
  int64_t round_tiles_, rounds_;
  int64_t tile_step_;
  T* zeros_;
  T* bias_sums_;   // [part][outputs]
  T* share_sums_;  // [share][panel][36][rows][width]
  T* image_;
  T* grads_;
  T* totals_;  // [panel][rows * 9][width], where there are several rounds
  Scratch scratch_;
  int64_t scratch_bytes_;
};

}  // namespace
}  // namespace gdfast::cpu
