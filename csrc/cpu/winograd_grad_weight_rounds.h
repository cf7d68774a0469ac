// grad_weight by Winograd's way for many channels: the sums of a product, [channels][width] for
// each panel of outputs, are too many for every thread to have its own.
//
//   image [task][products][tiles][kTaskChannels]
//   grads [panel][sums][tiles][width]
//
// Both are transformed a round of tiles at a time, and a task owns some channels of a panel for all
// tiles of the round, so that its sums never leave L2. The transform to weights being linear,
// rounds are added up as weights.
#pragma once

#include "shares.h"
#include "tap_conv_pixels.h"
#include "winograd_products.h"
#include "winograd_tiles.h"

namespace gdfast::cpu {
namespace {

// Pass has the transforms, and tells which products of image and grads make up which filter.
template <typename Pass>
class GradWeightRounds {
  using T = float;
  static constexpr int kWidth = kLanes<T>;
  // Tiles that one product runs over at once: their grads are 16 to 32 KB, in L1.
  static constexpr int64_t kStepTiles = kVectorRegisters == 32 ? 128 : 256;
  static constexpr int64_t kBlockTiles = 16;  // of a task that transforms
  // Up to so many tiles, products are over before the processor foresees where it will read.
  static constexpr int64_t kFewTiles = 48;
  using Filters = typename Pass::Filters;
  static constexpr int64_t kTaskChannels = Filters::kTaskChannels;

 public:
  GradWeightRounds(const Conv2dProblem& p, const T* grad_output, const T* input, T* grad_weight,
                   T* grad_bias, int threads)
      : p_(p),
        grad_output_(grad_output),
        input_(input),
        grad_bias_(grad_bias),
        threads_(threads),
        produced_(p.K / p.groups),
        grid_(p.N, p.P, p.Q),
        panels_(produced_),
        filters_(p, grad_weight),
        channels_(round_up(p.C / p.groups, kWidth)),
        tasks_(ceil_div(channels_, kTaskChannels)) {
    round_tiles_ = image_round_tiles(grid_.count, channels_ + outputs());
    rounds_ = ceil_div(grid_.count, round_tiles_);
    blocks_ = ceil_div(round_tiles_, kBlockTiles);
  }

  void run() {
    Workspace workspace(carve(Carver()));
    carve(Carver(workspace.data()));
    std::memset(zeros_, 0, zeros_size() * sizeof(T));
    for (int64_t group = 0; group < p_.groups; ++group) {
      for (int64_t round = 0; round < rounds_; ++round) run_round(group, round);
      if (grad_bias_ != nullptr) write_bias(group);
    }
  }

 private:
  struct Scratch {
    T* sums;   // [filters][kTaskChannels][width]
    T* lines;  // [kTaskChannels * 9][width], weights before they are written
    T* stage;
  };

  // Zeros stand for the channels of a pixel outside.
  int64_t zeros_size() const { return max_of(channels_, panels_.width); }
  int64_t outputs() const { return panels_.count * panels_.width; }
  // From one product to the next: a cache line more than there is, so that the same place of all
  // products spreads over the cache.
  int64_t image_step() const { return round_tiles_ * kTaskChannels + 16; }
  int64_t grads_step() const { return round_tiles_ * panels_.width + 16; }
  int64_t sums_step() const { return kTaskChannels * panels_.width + 16; }
  int64_t image_size() const { return Pass::kProducts * image_step(); }
  int64_t grads_size() const { return Pass::kSums * grads_step(); }
  int64_t lines_size() const { return kTaskChannels * 9 * panels_.width; }

  int64_t carve(Carver carver) {
    zeros_ = carver.take<T>(zeros_size());
    bias_sums_ = carver.take<T>(rounds_ * blocks_ * outputs());
    image_ = carver.take<T>(tasks_ * image_size());
    grads_ = carver.take<T>(panels_.count * grads_size());
    totals_ = carver.take<T>(rounds_ > 1 ? panels_.count * tasks_ * lines_size() : 0);
    const int64_t before = carver.used();
    scratch_.sums = carver.take<T>(Pass::kFilters * sums_step());
    scratch_.lines = carver.take<T>(lines_size());
    scratch_.stage = carver.take<T>(Pass::kStageSize);
    scratch_bytes_ = carver.used() - before;
    return before + scratch_bytes_ * threads_;
  }

  Scratch scratch_of(int thread) const {
    const auto move = [&](T* part) { return part + scratch_bytes_ / sizeof(T) * thread; };
    return {move(scratch_.sums), move(scratch_.lines), move(scratch_.stage)};
  }

  void run_round(int64_t group, int64_t round) {
    const int64_t begin = round * round_tiles_;
    const int64_t tiles = min_of(round_tiles_, grid_.count - begin);
    const auto block_of = [&](int64_t index) {
      const int64_t first = min_of(index * kBlockTiles, tiles);
      return TileRange{begin + first, begin + min_of(first + kBlockTiles, tiles)};
    };
    parallel_shares(blocks_, threads_, [&](int64_t index, int thread) {
      const TileRange own = block_of(index);
      transform_input(group, begin, own.begin, own.end, scratch_of(thread).stage);
      stream_fence();
    });
    // Panel by panel, as they are multiplied: most of them stay with one thread.
    parallel_shares(panels_.count * blocks_, threads_, [&](int64_t index, int thread) {
      const int64_t panel = index / blocks_, block = index % blocks_;
      const TileRange own = block_of(block);
      T* bias_sums = bias_sums_ + (round * blocks_ + block) * outputs() + panel * panels_.width;
      std::memset(bias_sums, 0, panels_.width * sizeof(T));
      transform_grads(group, panel, begin, own.begin, own.end, scratch_of(thread).stage, bias_sums);
      stream_fence();
    });
    parallel_shares(panels_.count * tasks_, threads_, [&](int64_t index, int thread) {
      const Scratch scratch = scratch_of(thread);
      const int64_t panel = index / tasks_, task = index % tasks_, c = task * kTaskChannels;
      multiply(image_ + task * image_size(), grads_ + panel * grads_size(), begin, tiles,
               min_of(kTaskChannels, channels_ - c), scratch.sums);
      T* lines = rounds_ > 1 ? totals_ + index * lines_size() : scratch.lines;
      filters_.transform_back(c, scratch.sums, sums_step(), 1, 0, round > 0, lines);
      if (round == rounds_ - 1) filters_.write(group, panel, c, lines);
    });
  }

  // Tiles [first, end) of a round that begins with tile `begin`.
  void transform_input(int64_t group, int64_t begin, int64_t first, int64_t end, T* stage) const {
    Pass::template transform_input<true>(
        p_, grid_, input_ + group * (p_.C / p_.groups) * p_.input.c, first, end, zeros_, stage,
        kTaskChannels, image_step(), [&](int64_t c, int64_t tile) {
          return image_ + c / kTaskChannels * image_size() + (tile - begin) * kTaskChannels +
                 c % kTaskChannels;
        });
  }

  void transform_grads(int64_t group, int64_t panel, int64_t begin, int64_t first, int64_t end,
                       T* stage, T* bias_sums) const {
    const int64_t width = panels_.width, output = panel * width;
    const int64_t own = min_of(width, produced_ - output);
    T* grads = grads_ + panel * grads_size();
    Pass::template transform_grads<true>(
        p_, grid_, grad_output_ + (group * produced_ + output) * p_.output.c, own, first, end,
        zeros_, stage, width, grads_step(),
        [&](int64_t k, int64_t tile) { return grads + (tile - begin) * width + k; }, bias_sums);
    // Lanes past the last output: their products must not be left to chance.
    for (int64_t k = round_up(own, kWidth); k < width; k += kWidth) {
      for (int64_t tile = first; tile < end; ++tile) {
        for (int x = 0; x < Pass::kSums; ++x) {
          store<T>(grads + x * grads_step() + (tile - begin) * width + k, Vec<T>{});
        }
      }
    }
  }

  // Has L2, or L1, fetch what one of several calls owes of `size` values.
  template <int kLocality>
  static void fetch(const T* from, int64_t size, int64_t call, int64_t calls) {
    const T* end = from + size * (call + 1) / calls;
    for (from += size * call / calls; from < end; from += 16) {
      __builtin_prefetch(from, 0, kLocality);
    }
  }

  // sums[filter][channel] = image times grads, over those of tiles [first, first + tiles) that need
  // each product.
  void multiply(const T* image, const T* grads, int64_t first, int64_t tiles, int64_t channels,
                T* sums) const {
    const int64_t width = panels_.width;
    const int64_t calls = ceil_div(channels, channels_at_once(panels_.vectors));
    for (int filter = 0; filter < Pass::kFilters; ++filter, sums += sums_step()) {
      bool started = false;
      const auto run = [&](const T* rows, const T* lines, int64_t count) {
        // 16 channels are 6 + 5 + 5, not 6 + 6 and a rest.
        for (int64_t call = 0; call < calls; ++call) {
          const int64_t c = channels * call / calls;
          // What the next product reads.
          if (count <= kFewTiles) {
            fetch<3>(rows + image_step(), count * kTaskChannels, call, calls);
          } else {
            fetch<2>(rows + image_step(), count * kTaskChannels, call, calls);
            fetch<2>(lines + grads_step(), count * width, call, calls);
          }
          multiply_tiles(channels * (call + 1) / calls - c, panels_.vectors, rows + c,
                         kTaskChannels, lines, width, count, started, Ahead(), sums + c * width);
        }
        started = true;
      };
      for (int x = 0; x < Pass::terms(filter); ++x) {
        const typename Pass::Term term = Pass::term(filter, x);
        const auto ranges = grid_.needing(term.last_row, term.last_column);
        for (const TileRange& range : ranges.part) {
          const TileRange own = range.within(first, first + tiles);
          for (int64_t tile = own.begin; tile < own.end; tile += kStepTiles) {
            run(image + term.product * image_step() + (tile - first) * kTaskChannels,
                grads + term.sum * grads_step() + (tile - first) * width,
                min_of(kStepTiles, own.end - tile));
          }
        }
      }
      if (!started) run(image, grads, 0);  // no tile needs it: it is zero
    }
  }

  void write_bias(int64_t group) {
    for (int64_t part = 1; part < rounds_ * blocks_; ++part) {
      for (int64_t k = 0; k < produced_; ++k) bias_sums_[k] += bias_sums_[part * outputs() + k];
    }
    copy_narrowed(bias_sums_, produced_, grad_bias_ + group * produced_, 1);
  }

  const Conv2dProblem& p_;
  const T* grad_output_;
  const T* input_;
  T* grad_bias_;
  int threads_;
  int64_t produced_;  // outputs of a group
  typename Pass::Grid grid_;
  Panels<T> panels_;
  Filters filters_;
  int64_t channels_;  // reduced ones, padded to whole vectors
  int64_t tasks_;     // of a panel
  int64_t round_tiles_, rounds_, blocks_;
  T* zeros_;
  T* bias_sums_;  // [round][block][outputs]
  T* image_;
  T* grads_;
  T* totals_;  // [panel][task][kTaskChannels * 9][width], where there are several rounds
  Scratch scratch_;
  int64_t scratch_bytes_;
};

}  // namespace
}  // namespace gdfast::cpu
