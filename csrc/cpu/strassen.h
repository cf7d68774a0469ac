// 1x1 convolutions of float32 whose channels lie side by side, as Pointwise has them, by Strassen's
// algorithm: seven products of halves instead of eight.
//
// It takes one step of it, on the squares of strassen_square.h: so small that no sums of operands
// or products ever leave the caches. Twelve pixels make a pair of tiles. The seven sums of its two
// halves of a part of the channels are made when the block comes to it, and stay in L2 while all
// panels pass by; those of the weights are made once per call.
#pragma once

#include "pixel_lines.h"
#include "strassen_square.h"

namespace gdfast::cpu {
namespace {

// Of a convolution that is_pointwise().
inline bool strassen_fits(const TapConv& conv) {
  return conv.reduced % 128 == 0 && conv.produced % kSquareWidth == 0;
}

class Strassen {
  using T = float;
  static constexpr int64_t kWidth = kPanelWidth<T>;
  // Pairs of a block: with 128 channels to a half the sums of one are 21 KB, and the weights' for a
  // square, which L2 holds too, 224 KB with AVX-512.
  static constexpr int64_t kMostPairs = 16;

 public:
  Strassen(const TapConv& conv, const T* source, const T* weight, const T* bias, T* dest,
           int threads)
      : conv_(conv),
        source_(PixelLines<const T>::source(conv, source)),
        weight_(weight),
        bias_(bias),
        dest_(PixelLines<T>::dest(conv, dest)),
        threads_(threads),
        half_(conv.reduced % 256 == 0 ? 128 : 64),
        parts_(conv.reduced / (2 * half_)),
        squares_(conv.produced / kSquareWidth) {}

  // As Pointwise has it.
  bool adds_at_once() const { return parts_ == 1; }

  void run() {
    const ThreadScratch scratch = make_scratch();
    pack_weights();
    // Blocks of equal size, so that the threads end together.
    const int64_t pairs = ceil_div(conv_.pixels(), kSquareRows);
    const int64_t blocks = min_of(round_up(ceil_div(pairs, kMostPairs), threads_), pairs);
    parallel_for(blocks, threads_, [&](int64_t at, int thread) {
      const int64_t first = pairs * at / blocks * kSquareRows;
      const int64_t end = min_of(pairs * (at + 1) / blocks * kSquareRows, conv_.pixels());
      run_pixels(first, end, nullptr, scratch, thread);
    });
  }

  // What run_pixels() needs, beside pack_weights() in front of it.
  ThreadScratch make_scratch() {
    return ThreadScratch(
        threads_,
        [&](Carver& carver) {
          packed_ = carver.template take<T>(squares_ * parts_ * panels_size());
          starts_ = carver.template take<T>(conv_.produced);
        },
        [&](Carver& carver) { carve(carver); });
  }

  void pack_weights() {
    for (int64_t o = 0; o < conv_.produced; ++o) starts_[o] = bias_ == nullptr ? T(0) : bias_[o];
    parallel_for(squares_ * parts_, threads_,
                 [&](int64_t index, int) { pack(index / parts_, index % parts_); });
  }

  // Pixels [first, end) of dest, on the calling thread alone; with `lines`, those of source lie
  // there, side by side. Which pixels make a pair, and so how they are rounded, depends on first.
  void run_pixels(int64_t first, int64_t end, const T* lines, const ThreadScratch& scratch,
                  int thread) const {
    Carver carver = scratch.of(thread);
    const Own own = carve(carver);
    const int64_t pairs = ceil_div(end - first, kSquareRows), blocks = ceil_div(pairs, kMostPairs);
    for (int64_t at = 0; at < blocks; ++at) {
      const int64_t begin = pairs * at / blocks * kSquareRows;
      const int64_t stop = min_of(pairs * (at + 1) / blocks * kSquareRows, end - first);
      block(first + begin, first + stop, lines == nullptr ? nullptr : lines + begin * conv_.reduced,
            own);
    }
  }

 private:
  struct Own {
    const T** source;  // [pixels], and a pair more: where a part of each pixel lies
    T** out;           // [pixels]
    T* rows;           // [pairs][kSquareProducts][kTileRows][half]
    T* unused;         // a line of dest, for pixels past the end
  };

  Own carve(Carver& carver) const {
    Own own;
    own.source = carver.template take<const T*>((kMostPairs + 1) * kSquareRows);
    own.out = carver.template take<T*>(kMostPairs * kSquareRows);
    own.rows = carver.template take<T>(kMostPairs * rows_size());
    own.unused = carver.template take<T>(conv_.produced);
    return own;
  }

  int64_t rows_size() const { return kSquareProducts * kTileRows * half_; }
  int64_t panels_size() const { return kSquareProducts * half_ * kWidth; }
  T* panels(int64_t square, int64_t part) const {
    return packed_ + (square * parts_ + part) * panels_size();
  }

  void pack(int64_t square, int64_t part) const {
    const int64_t channel = part * 2 * half_, first = square * kSquareWidth;
    const int64_t size = half_ * kWidth;
    T* const to = panels(square, part);
    pack_quarter(channel, first, to + kB11 * size);
    pack_quarter(channel, first + kWidth, to + kT1 * size);  // B12, for now
    pack_quarter(channel + half_, first, to + kB21 * size);
    pack_quarter(channel + half_, first + kWidth, to + kB22 * size);
    for (T* at = to; at < to + size; at += kLanes<T>) {
      const Vec<T> b11 = load(at + kB11 * size), b12 = load(at + kT1 * size);
      const Vec<T> b21 = load(at + kB21 * size), b22 = load(at + kB22 * size);
      const Vec<T> t1 = b12 - b11, t2 = b22 - t1;
      store<T>(at + kT1 * size, t1);
      store<T>(at + kT2 * size, t2);
      store<T>(at + kT3 * size, b22 - b12);
      store<T>(at + kT4 * size, b21 - t2);
    }
  }

  void pack_quarter(int64_t channel, int64_t first, T* to) const {
    pack_weight_part(conv_, weight_, channel, half_, first, kWidth, to);
  }

  void block(int64_t first, int64_t end, const T* lines, const Own& own) const {
    const int64_t pixels = end - first, pairs = ceil_div(pixels, kSquareRows);
    dest_.point(first, pixels, 0, own.out);
    for (int64_t x = pixels; x < pairs * kSquareRows; ++x) own.out[x] = own.unused;
    for (int64_t part = 0; part < parts_; ++part) {
      source_.point_block(first, pixels, (pairs + 1) * kSquareRows, part * 2 * half_, lines,
                          own.source);
      SquareArgs args;
      args.half = half_;
      if (part == parts_ - 1) args.ending = Ending<T>::of(conv_);
      for (int64_t square = 0; square < squares_; ++square) {
        args.panels = panels(square, part);
        args.column = square * kSquareWidth;
        args.start = part == 0 && !conv_.adds ? starts_ + args.column : nullptr;
        for (int64_t pair = 0; pair < pairs; ++pair) {
          T* const rows = own.rows + pair * rows_size();
          const T* const* source = own.source + pair * kSquareRows;
          if (square == 0) add_rows(source, rows);
          args.rows = rows;
          args.ahead = square == 0 ? source + kSquareRows : nullptr;
          args.out = own.out + pair * kSquareRows;
          multiply_square(args);
        }
      }
    }
  }

  // The seven sums of a pair's two tiles and two halves.
  void add_rows(const T* const* source, T* to) const {
    const int64_t size = kTileRows * half_;
    for (int i = 0; i < kTileRows; ++i, to += half_) {
      const T *upper = source[i], *lower = source[kTileRows + i];
      for (int64_t x = 0; x < half_; x += kLanes<T>) {
        const Vec<T> a11 = load(upper + x), a12 = load(upper + half_ + x);
        const Vec<T> a21 = load(lower + x), a22 = load(lower + half_ + x);
        const Vec<T> s1 = a21 + a22, s2 = s1 - a11;
        T* const at = to + x;
        store<T>(at + kA11 * size, a11);
        store<T>(at + kA12 * size, a12);
        store<T>(at + kA22 * size, a22);
        store<T>(at + kS1 * size, s1);
        store<T>(at + kS2 * size, s2);
        store<T>(at + kS3 * size, a11 - a21);
        store<T>(at + kS4 * size, a12 - s2);
      }
    }
  }

  const TapConv& conv_;
  PixelLines<const T> source_;
  const T* weight_;
  const T* bias_;
  PixelLines<T> dest_;
  int threads_;
  int64_t half_, parts_;  // of the channels
  int64_t squares_;       // side by side
  T* packed_;
  T* starts_;
};

}  // namespace
}  // namespace gdfast::cpu
