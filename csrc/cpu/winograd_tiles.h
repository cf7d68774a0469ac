// The tiles that Winograd's convolution cuts an image into, and how they are read.
#pragma once

#include "../conv2d_problem.h"
#include "memory_ahead.h"
#include "pack.h"
#include "tile.h"
#include "winograd_transforms.h"

namespace gdfast::cpu {
namespace {

// A line of pixels cut into `count` tiles: `whole` of kOut, then tiles of at most one less. Of
// those the product at infinity, the last one, is never needed: it goes into the last output alone.
// In fours 14 pixels are 4 + 4 + 3 + 3, not 4 + 4 + 4 + 2, which drops more of them.
template <int kOut>
struct TileLineOf {
  int64_t size, count, whole;

  explicit TileLineOf(int64_t size)
      : size(size), count(ceil_div(size, kOut)), whole(max_of(0, size - (kOut - 1) * count)) {}

  int64_t begin(int64_t tile) const { return tile * kOut - max_of(0, tile - whole); }
  int64_t length(int64_t tile) const {
    return tile < whole ? kOut : min_of(kOut - 1, size - begin(tile));
  }
};

// A range of tiles.
struct TileRange {
  int64_t begin, end;

  TileRange within(int64_t first, int64_t last) const {
    return {max_of(begin, first), min_of(end, last)};
  }
  bool empty() const { return begin >= end; }
};

// The tiles of a grid of pixels, all images of a batch. They are counted by their kind, so that the
// tiles that need a product follow each other: 4x4 outputs, 4x3, 3x3, 3x4 (rows x columns, where
// kOut is 4); within a kind image by image and line by line.
template <int kOut>
struct TileGridOf {
  TileLineOf<kOut> down, across;
  int64_t count;

  TileGridOf(int64_t batch, int64_t height, int64_t width)
      : down(height), across(width), count(batch * down.count * across.count) {
    const int64_t high = down.whole, wide = across.whole;
    const int64_t low = down.count - high, narrow = across.count - wide;
    kinds_[0] = {0, high, 0, wide, 0};
    kinds_[1] = {0, high, wide, narrow, batch * high * wide};
    kinds_[2] = {high, low, wide, narrow, kinds_[1].first + batch * high * narrow};
    kinds_[3] = {high, low, 0, wide, kinds_[2].first + batch * low * narrow};
  }

  // Whether all tiles have kOut x kOut pixels.
  bool is_whole() const { return down.whole == down.count && across.whole == across.count; }

  // Where a tile lies: its image, the pixel of the grid that it begins at, and how many it has.
  struct At {
    int64_t n, h, w, rows, columns;
  };
  At at(int64_t tile) const {
    const Kind& kind = kind_of(tile);
    const int64_t index = tile - kind.first, line = index / kind.columns;
    const int64_t i = kind.row + line % kind.rows, j = kind.column + index % kind.columns;
    return {line / kind.rows, down.begin(i), across.begin(j), down.length(i), across.length(j)};
  }

  // Tiles from `tile` on that follow each other along a line, at most kRun.
  static constexpr int64_t kRun = 8;
  int64_t run_from(int64_t tile, int64_t end) const {
    const Kind& kind = kind_of(tile);
    const int64_t in_line = kind.columns - (tile - kind.first) % kind.columns;
    return min_of(kRun, min_of(end - tile, in_line));
  }

  // The tiles that need what goes into the last row or column of outputs alone, or into neither;
  // as two ranges of which each may be empty.
  struct Ranges {
    TileRange part[2];
  };
  Ranges needing(bool last_row, bool last_column) const {
    if (last_column) return {{{0, kinds_[1].first}, {last_row ? count : kinds_[3].first, count}}};
    return {{{0, last_row ? kinds_[2].first : count}, {count, count}}};
  }

  // Those that need one of the products of a 3x3 kernel with stride 1.
  Ranges needing(int product) const {
    constexpr int kIn = kOut + 2;
    return needing(product / kIn == kIn - 1, product % kIn == kIn - 1);
  }

 private:
  struct Kind {
    int64_t row, rows, column, columns;  // of every image: lines [row, row + rows) of tiles
    int64_t first;                       // tile
  };
  const Kind& kind_of(int64_t tile) const {
    int kind = 3;
    while (tile < kinds_[kind].first) --kind;
    return kinds_[kind];
  }

  Kind kinds_[4];
};

using TileGrid = TileGridOf<kTileOut>;

// Tiles of one block or task, and how far apart their vectors lie: an odd number of cache lines,
// so that the 36 products of one tile spread over all sets of the cache.
inline int64_t padded_tiles(int64_t tiles) { return tiles | 1; }

// Writes a vector of a transformed image, with `stream` past the caches, where it is a whole line
// of them: of an image that they do not hold, lines need not be read first, nor taken from the
// cores that have read them.
GDFAST_INLINE void put_vector(float* to, Vec<float> value, bool stream) {
  stream&& kVectorBytes == 64 ? store_streaming<float>(to, value) : store<float>(to, value);
}

// Whether so many outputs are written past the caches: waiting for the lines that they overwrite
// takes longer than the next kernel waits for them.
inline bool streams_outputs(const float* dest, const Strides4& strides, int64_t size) {
  constexpr int64_t kLeast = 128 * 1024, kLine = 64 / sizeof(float);
  return strides.c == 1 && (strides.n | strides.h | strides.w) % kLine == 0 &&
         reinterpret_cast<uintptr_t>(dest) % 64 == 0 && size >= kLeast;
}

// Tiles whose transformed image is kept at once: about 32 MB of it, for it is more than twice as
// large as the image itself; at least as many as make the transformed weights worth their while.
inline int64_t image_round_tiles(int64_t tiles, int64_t channels) {
  const int64_t most = max_of(396, (32 << 20) / (kProducts * channels * 4));
  return round_up(ceil_div(tiles, ceil_div(tiles, most)), kTileRows);
}

// Reads, for every tile of a grid, the kSize x kSize pixels from (h * kStep + low_h, w * kStep +
// low_w) on as vectors of channels: where they lie, or from a stage that brings channels side by
// side.
template <int kSize, int kOut = kTileOut, int kStep = 1>
class TileReader {
  using T = float;
  using Grid = TileGridOf<kOut>;
  using At = typename Grid::At;
  static constexpr int kWidth = kLanes<T>;
  static constexpr int64_t kColumns = (Grid::kRun - 1) * kOut * kStep + kSize;

 public:
  static constexpr int64_t kStageSize = kSize * kColumns * kWidth;
  static constexpr int kRows = kSize;

  TileReader(const Grid& grid, const T* data, const Strides4& strides, int64_t channels,
             int64_t height, int64_t width, int64_t low_h, int64_t low_w)
      : grid_(grid),
        data_(data),
        strides_(strides),
        channels_(channels),
        height_(height),
        width_(width),
        low_h_(low_h),
        low_w_(low_w) {}

  // Calls use(from, offset, c, tile) for tiles [first, end) and each vector of channels: the
  // vectors lie at from[i * kSize + j] + offset. kTogether tiles take turns at each vector where
  // that is how their results lie. zeros holds as many as there are channels, padded.
  template <int kTogether = 1, typename Use>
  void read(int64_t first, int64_t end, const T* zeros, T* stage, const Use& use) const {
    const T* from[kSize * kSize];
    // Whole vectors of channels are read where they lie.
    const int64_t in_place = strides_.c == 1 ? channels_ / kWidth * kWidth : 0;
    if (in_place > 0) {
      const T* pixels[kTogether][kSize * kSize];
      for (int64_t tile = first; tile < end; tile += kTogether) {
        const int64_t count = min_of(kTogether, end - tile);
        for (int64_t x = 0; x < count; ++x) point(tile + x, zeros, pixels[x]);
        for (int64_t c = 0; c < in_place; c += kWidth) {
          for (int64_t x = 0; x < count; ++x) use(pixels[x], c, c, tile + x);
        }
      }
    }
    for (int64_t c = in_place; c < channels_; c += kWidth) {
      for (int64_t tile = first; tile < end;) {
        const At begin = grid_.at(tile);
        const int64_t run = grid_.run_from(tile, end);
        fill(c, begin, (grid_.at(tile + run - 1).w - begin.w) * kStep + kSize, stage);
        for (int64_t x = 0; x < run; ++x, ++tile) {
          const At at = grid_.at(tile);
          for (int i = 0; i < kSize; ++i) {
            for (int j = 0; j < kSize; ++j) {
              const bool own = own_row(at, i) && own_column(at, j);
              from[i * kSize + j] =
                  own ? stage + (i * kColumns + (at.w - begin.w) * kStep + j) * kWidth : zeros;
            }
          }
          use(from, 0, c, tile);
        }
      }
    }
  }

  // Adds what tiles [first, end) see to what is fetched ahead: kRows stretches a tile at most.
  void ahead(int64_t first, int64_t end, MemoryAhead& to) const {
    if (strides_.c != 1) return;
    for (int64_t tile = first; tile < end;) {
      const At at = grid_.at(tile);
      tile += grid_.run_from(tile, end);
      const int64_t w = at.w * kStep + low_w_, left = max_of(0, w);
      const int64_t right = min_of(width_, w + (grid_.at(tile - 1).w - at.w) * kStep + kSize);
      if (left >= right) continue;
      for (int i = 0; i < kSize; ++i) {
        const int64_t h = at.h * kStep + low_h_ + i;
        if (h < 0 || h >= height_) continue;
        to.add(data_ + at.n * strides_.n + h * strides_.h + left * strides_.w,
               (right - left - 1) * strides_.w + channels_, false);
      }
    }
  }

 private:
  // Images overlap; of kOut x kOut pixels each belongs to one tile, and is zero for the others.
  static bool own_row(const At& at, int i) { return kSize != kOut || i < at.rows; }
  static bool own_column(const At& at, int j) { return kSize != kOut || j < at.columns; }

  // Points to the pixels of one tile, or to zeros.
  void point(int64_t tile, const T* zeros, const T** pixels) const {
    const At at = grid_.at(tile);
    const T* image = data_ + at.n * strides_.n;
    const int64_t h0 = at.h * kStep + low_h_, w0 = at.w * kStep + low_w_;
    if (h0 >= 0 && h0 + kSize <= height_ && w0 >= 0 && w0 + kSize <= width_ &&
        own_row(at, kSize - 1) && own_column(at, kSize - 1)) {
      const T* row = image + h0 * strides_.h + w0 * strides_.w;
      for (int i = 0; i < kSize; ++i, row += strides_.h) {
#pragma GCC unroll 7
        for (int j = 0; j < kSize; ++j) *pixels++ = row + j * strides_.w;
      }
      return;
    }
    for (int i = 0; i < kSize; ++i) {
      const int64_t h = h0 + i;
      const bool row_inside = own_row(at, i) && h >= 0 && h < height_;
      for (int j = 0; j < kSize; ++j) {
        const int64_t w = w0 + j;
        const bool inside = row_inside && own_column(at, j) && w >= 0 && w < width_;
        pixels[i * kSize + j] = inside ? image + h * strides_.h + w * strides_.w : zeros;
      }
    }
  }

  // stage[i][x][lane]: what a run of tiles sees of channels [c, c + lanes), `columns` pixels of it.
  void fill(int64_t c, At at, int64_t columns, T* stage) const {
    const int64_t channels = min_of(kWidth, channels_ - c);
    const int64_t w0 = at.w * kStep + low_w_;
    const int64_t begin = min_of(columns, max_of(0, -w0));
    const int64_t end = max_of(begin, min_of(columns, width_ - w0));
    for (int i = 0; i < kSize; ++i, stage += kColumns * kWidth) {
      const int64_t h = at.h * kStep + low_h_ + i;
      if (h < 0 || h >= height_ || begin == end) {
        std::memset(stage, 0, columns * kWidth * sizeof(T));
        continue;
      }
      const T* from =
          data_ + at.n * strides_.n + c * strides_.c + h * strides_.h + (w0 + begin) * strides_.w;
      std::memset(stage, 0, begin * kWidth * sizeof(T));
      if (strides_.w == 1) {
        transpose_widened(from, strides_.c, end - begin, channels, kWidth, stage + begin * kWidth,
                          kWidth);
      } else {
        for (int64_t x = begin; x < end; ++x, from += strides_.w) {
          copy_widened(from, strides_.c, channels, stage + x * kWidth);
          for (int64_t lane = channels; lane < kWidth; ++lane) stage[x * kWidth + lane] = T(0);
        }
      }
      std::memset(stage + end * kWidth, 0, (columns - end) * kWidth * sizeof(T));
    }
  }

  const Grid& grid_;
  const T* data_;
  Strides4 strides_;
  int64_t channels_, height_, width_, low_h_, low_w_;
};

}  // namespace
}  // namespace gdfast::cpu
