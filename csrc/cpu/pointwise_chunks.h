// A chunk of pixels as the tiles of a matrix product whose reduction runs over pixels: copies of
// its rows and columns in the order that the micro-kernel reads.
#pragma once

#include "pack.h"
#include "tile.h"

namespace gdfast::cpu {
namespace {

class ChunkTiles {
 protected:
  using T = float;
  static constexpr int64_t kLine = 64 / sizeof(T);
  static constexpr int64_t kPanelsAtOnce = 8;  // in copying, so that 512 bytes are read in a row

  ChunkTiles(int64_t rows, int64_t columns)
      : rows_(rows),
        columns_(columns),
        tiles_(ceil_div(rows, kTileRows)),
        vectors_(ceil_div(columns, kLanes<T>)),
        panel_vectors_(ceil_div(vectors_, ceil_div(vectors_, kMaxVectors))),
        panels_(ceil_div(vectors_, panel_vectors_)) {}

  // All panels but the last have one width.
  int64_t first_channel(int64_t panel) const { return panel * panel_vectors_ * kLanes<T>; }
  int64_t vectors(int64_t panel) const {
    return min_of(panel_vectors_, vectors_ - panel * panel_vectors_);
  }
  // From one panel, or one tile, of a chunk to the next: a line more than it has, or many would
  // meet in one set of L1.
  int64_t panel_size(int64_t pixels) const { return pixels * panel_vectors_ * kLanes<T> + kLine; }
  static int64_t tile_size(int64_t pixels) { return pixels * kTileRows + kLine; }

  // panels[panel][pixel][panel width] = columns of the lines, zeros past the last one.
  void pack_panels(const T* const* lines, int64_t pixels, T* panels) const {
    const int64_t whole = columns_ / (panel_vectors_ * kLanes<T>);
    for (int64_t panel = 0; panel < whole; panel += kPanelsAtOnce) {
      const int64_t count = min_of(kPanelsAtOnce, whole - panel);
      switch (panel_vectors_) {
        case 1:
          copy_panels<1>(lines, panel, count, pixels, panels);
          break;
        case 2:
          copy_panels<2>(lines, panel, count, pixels, panels);
          break;
        case 3:
          copy_panels<3>(lines, panel, count, pixels, panels);
          break;
        case 4:
          copy_panels<4>(lines, panel, count, pixels, panels);
          break;
      }
    }
    if (whole == panels_) return;
    const int64_t channel = first_channel(whole), width = vectors(whole) * kLanes<T>;
    T* to = panels + whole * panel_size(pixels);
    for (int64_t x = 0; x < pixels; ++x, to += width) {
      for (int64_t j = 0; j < width; ++j) {
        to[j] = channel + j < columns_ ? lines[x][channel + j] : T(0);
      }
    }
  }

  // rows[tile][pixel][kTileRows] = rows of the lines from tile0 on.
  void pack_rows(const T* const* lines, int64_t tile0, int64_t tiles, int64_t pixels,
                 T* rows) const {
    const int64_t whole = min_of(tiles, rows_ / kTileRows - tile0);
    // Where a vector is longer than a tile and does not leave the pixel, it is copied: what it has
    // too much is overwritten by the next pixel, or lies in the line between two tiles.
    static_assert(kTileRows + kLine >= kLanes<T>);
    const int64_t left = rows_ - tile0 * kTileRows - kLanes<T>;
    const int64_t overlapping =
        kLanes<T> < kTileRows || left < 0 ? 0 : min_of(whole, left / kTileRows + 1);
    for (int64_t x = 0; x < pixels; ++x) {
      const T* from = lines[x] + tile0 * kTileRows;
      T* to = rows + x * kTileRows;
      for (int64_t tile = 0; tile < overlapping; ++tile) {
        store<T>(to, load(from));
        from += kTileRows;
        to += tile_size(pixels);
      }
      for (int64_t tile = overlapping; tile < whole; ++tile) {
        std::memcpy(to, from, kTileRows * sizeof(T));
        from += kTileRows;
        to += tile_size(pixels);
      }
      if (whole == tiles) continue;
      for (int64_t i = 0; i < kTileRows; ++i) to[i] = i < rows_ % kTileRows ? from[i] : T(0);
    }
  }

  int64_t rows_, columns_;
  int64_t tiles_, vectors_, panel_vectors_, panels_;

 private:
  template <int kVectors>
  void copy_panels(const T* const* lines, int64_t panel, int64_t count, int64_t pixels,
                   T* panels) const {
    constexpr int64_t kWidth = kVectors * kLanes<T>;
    const int64_t step = panel_size(pixels);
    T* line = panels + panel * panel_size(pixels);
    for (int64_t x = 0; x < pixels; ++x, line += kWidth) {
      const T* from = lines[x] + first_channel(panel);
      T* to = line;
      for (int64_t i = 0; i < count; ++i, from += kWidth, to += step) {
        for (int j = 0; j < kVectors; ++j) {
          store<T>(to + j * kLanes<T>, load(from + j * kLanes<T>));
        }
      }
    }
  }
};

}  // namespace
}  // namespace gdfast::cpu
