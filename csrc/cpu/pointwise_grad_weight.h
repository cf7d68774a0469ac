// grad_weight of 1x1 convolutions of float32 whose channels lie side by side: a matrix product
// whose reduction runs over the pixels.
//
//   grad_weight[k, c] = sum over pixels of grad_output[pixel, k] * input[pixel, c]
//
// A tile is rows k x columns c; with AVX-512 the other way round where that fills tiles better.
// Pixels are taken in chunks, of which both operands are copied into the order that the
// micro-kernel reads: as they lie in memory, one step of it would go from one pixel to the next, to
// another page each time. A panel of a chunk stays in L1 while a block of rows passes by, which
// stays in L2. With AVX-512 a step takes long enough for L2 to answer: there operands that are read
// few times are not copied, if their pixels lie at even distances.
//
// A task owns a range of rows and a share of the pixels. Shares are added up in a fixed order: the
// result depends on their number, which shape and threads decide, and never on timing.
#pragma once

#include "pointwise_chunks.h"
#include "tile_column.h"

namespace gdfast::cpu {
namespace {

// Whether a gradient in the weight of float32 is one of these.
inline bool is_pointwise_grad_weight(const Conv2dProblem& p) {
  return p.R == 1 && p.S == 1 && p.groups == 1 && p.pad_h == 0 && p.pad_w == 0 && p.input.c == 1 &&
         p.output.c == 1 && p.weight.c == 1 && p.N > 0 && (p.P - 1) * p.stride_h < p.H &&
         (p.Q - 1) * p.stride_w < p.W;
}

// What writes a chunk of grad_output, pixels [first, end), where it is needed: side by side. It
// reads as many values of every pixel, twice.
struct ChunkSource {
  void (*write)(const void* self, int64_t first, int64_t end, float* to, int thread);
  const void* self;
  const float* reads[2];
};

class PointwiseGradWeight : ChunkTiles {
  static constexpr int64_t kChunkPixels = kVectorRegisters == 32 ? 252 : 126;
  // Tiles of a block: 128 KB of a chunk's pixels.
  static constexpr int64_t kMostTiles = 128 * 1024 / (kChunkPixels * kTileRows * sizeof(T));
  // Rows and columns up to which what the others multiply is read where it lies.
  static constexpr int64_t kMostInPlace = 512;

 public:
  // grad_bias may be null.
  PointwiseGradWeight(const Conv2dProblem& p, const T* grad_output, const T* input, T* grad_weight,
                      T* grad_bias, int threads)
      : ChunkTiles(swaps(p) ? p.C : p.K, swaps(p) ? p.K : p.C),
        p_(p),
        grad_output_(grad_output),
        input_(input),
        grad_weight_(grad_weight),
        grad_bias_(grad_bias),
        threads_(threads),
        pixels_(p.N * p.P * p.Q),
        swapped_(swaps(p)) {
    // A share more costs three passes over the weights, a range more one over the input.
    const int64_t most_shares = ceil_div(pixels_, kChunkPixels);
    if (pixels_ >= 3 * rows_) {
      shares_ = min_of(threads, most_shares);
      ranges_ = min_of(ceil_div(threads, shares_), tiles_);
    } else {
      ranges_ = min_of(threads, tiles_);
      shares_ = min_of(ceil_div(threads, ranges_), most_shares);
    }
    const int64_t share = ceil_div(pixels_, shares_);
    chunk_ = round_up(ceil_div(share, ceil_div(share, kChunkPixels)), kTileRows);
    const int64_t range = ceil_div(tiles_, ranges_);
    block_tiles_ = ceil_div(range, ceil_div(range, kMostTiles));
    in_place_ = shares_ == 1 && !swapped_ && columns_ % kLanes<T> == 0;
    width_ = vectors_ * kLanes<T>;
  }

  // Whether each pixel belongs to one task alone.
  bool takes_pixels_once() const { return ranges_ == 1; }

  // With a source, each chunk of grad_output comes from there.
  void run(const ChunkSource* source = nullptr) {
    source_ = source;
    // So many lines of a chunk are fetched ahead by a tile, or fewer.
    const int64_t read = p_.C + (source == nullptr ? 1 : 2) * p_.K;
    const int64_t by_tile = ceil_div(ceil_div(chunk_ * read, kLine), tiles_ * panels_ * kTileRows);
    stretch_ = kFetchesMore ? max_of(2, min_of(kLine, chunk_ / by_tile / 2 * 2)) : kLine;
    ThreadScratch scratch(
        threads_,
        [&](Carver& carver) {
          sums_ = carver.template take<T>(in_place_ ? 0 : shares_ * rows_ * width_);
          bias_sums_ = carver.template take<T>(shares_ * p_.K);
          zeros_ = carver.template take<T>(kPanelWidth<T>);
        },
        [&](Carver& carver) { carve(carver); });
    std::memset(zeros_, 0, kPanelWidth<T> * sizeof(T));
    parallel_for(ranges_ * shares_, threads_, [&](int64_t index, int thread) {
      Carver carver = scratch.of(thread);
      task(index / shares_, index % shares_, thread, carve(carver));
    });
    if (grad_bias_ != nullptr) write_bias();
    if (in_place_) return;
    const int64_t pieces = min_of(p_.K, 8 * threads_);
    parallel_for(pieces, threads_, [&](int64_t index, int) {
      write(p_.K * index / pieces, p_.K * (index + 1) / pieces);
    });
  }

 private:
  struct Own {
    T* rows;                // [block tiles][chunk pixels][kTileRows]
    T* panels;              // [panels][chunk pixels][panel width]
    const T** row;          // [block tiles][kTileRows]
    const T** ahead;        // [block tiles][kTileRows]
    T** out;                // [block tiles][kTileRows]
    const T** grad_output;  // [chunk pixels]
    const T** input;        // [chunk pixels]
    T* unused;              // a line of sums, for rows past the last k
    T* lines;               // [chunk pixels][K], and a vector more: what a source writes
  };

  static bool swaps(const Conv2dProblem& p) {
    return kVectorRegisters == 32 && p.N * p.P * p.Q >= 3 * max_of(p.K, p.C) &&
           step_cost(p.C, p.K) < step_cost(p.K, p.C);
  }

  // What a step of the micro-kernel takes over all rows and columns, in products and loads.
  static int64_t step_cost(int64_t rows, int64_t columns) {
    const int64_t vectors = ceil_div(columns, kLanes<T>), panels = ceil_div(vectors, kMaxVectors);
    return ceil_div(rows, kTileRows) * (kTileRows * vectors + panels);
  }

  Own carve(Carver& carver) const {
    Own own;
    own.rows = carver.template take<T>(block_tiles_ * tile_size(chunk_));
    own.panels = carver.template take<T>(panels_ * panel_size(chunk_));
    own.row = carver.template take<const T*>(block_tiles_ * kTileRows);
    own.ahead = carver.template take<const T*>(block_tiles_ * kTileRows);
    own.out = carver.template take<T*>((block_tiles_ + 1) * kTileRows);
    own.grad_output = carver.template take<const T*>(chunk_);
    own.input = carver.template take<const T*>(chunk_);
    own.unused = carver.template take<T>(width_);
    own.lines = carver.template take<T>(source_ == nullptr ? 0 : chunk_ * p_.K + kLanes<T>);
    return own;
  }

  void task(int64_t range, int64_t share, int thread, const Own& own) const {
    const int64_t tile0 = tiles_ * range / ranges_, tile_end = tiles_ * (range + 1) / ranges_;
    const T* const* row_lines = swapped_ ? own.input : own.grad_output;
    const T* const* column_lines = swapped_ ? own.grad_output : own.input;
    // What is read often is worth a copy.
    const bool copies_rows = columns_ > kMostInPlace && rows_ > kMostInPlace;
    const int64_t row_step = copies_rows ? 0 : swapped_ ? input_step() : grad_output_step();
    const bool copies_columns = rows_ > kMostInPlace;
    const int64_t column_step = copies_columns ? 0 : swapped_ ? grad_output_step() : input_step();
    const int64_t begin = pixels_ * share / shares_, end = pixels_ * (share + 1) / shares_;
    for (int64_t first = begin; first < end; first += chunk_) {
      const int64_t pixels = min_of(chunk_, end - first);
      point(first, pixels, own);
      if (source_ != nullptr)
        source_->write(source_->self, first, first + pixels, own.lines, thread);
      // Whole vectors of the chunk's last pixel must not end beyond the tensor: with few columns
      // they reach over several of the pixels that follow.
      const bool columns_lie =
          column_step > 0 && width_ - columns_ <= (pixels_ - first - pixels) * column_step;
      if (!columns_lie) pack_panels(column_lines, pixels, own.panels);
      ColumnArgs<T> args;
      args.rows = own.row;
      args.stretch = stretch_;
      args.ahead_step = kTileRows * kLine;
      Ahead ahead = ahead_of(first + pixels, end, own);
      args.out = own.out;
      args.out_ahead = own.out + kTileRows;
      args.row_step = row_step > 0 ? row_step : kTileRows;
      args.length = pixels;
      args.start = first == begin ? zeros_ : nullptr;
      if (grad_bias_ != nullptr && range == 0) {
        add_bias(pixels, first == begin, bias_sums_ + share * p_.K, own);
      }
      for (int64_t tile = tile0; tile < tile_end; tile += block_tiles_) {
        args.tiles = min_of(block_tiles_, tile_end - tile);
        if (row_step == 0) pack_rows(row_lines, tile, args.tiles, pixels, own.rows);
        for (int64_t i = 0; i < args.tiles * kTileRows; ++i) {
          own.row[i] = row_step == 0 ? own.rows + i / kTileRows * tile_size(pixels) + i % kTileRows
                                     : row_lines[0] + min_of(tile * kTileRows + i, rows_ - 1);
        }
        point_out(tile, args.tiles, share, own);
        for (int64_t panel = 0; panel < panels_; ++panel) {
          args.ahead = fetch(ahead, pixels, args.tiles, own);
          args.row_ahead = row_step > 0 && panel == 0 ? 2 * kTileRows - 1 : 0;
          args.column = first_channel(panel);
          args.panel =
              columns_lie ? column_lines[0] + args.column : own.panels + panel * panel_size(pixels);
          args.panel_step = columns_lie ? column_step : vectors(panel) * kLanes<T>;
          multiply_column(vectors(panel), args);
        }
      }
    }
  }

  // What the next chunk reads, as stretches of memory. With a stride it would be many, but of more
  // bytes each: those come quickly enough by themselves.
  struct Ahead {
    struct {
      const T *from, *end;
    } stretch[3];
    int at;

    bool ends() {
      while (at < 3 && stretch[at].from >= stretch[at].end) ++at;
      return at == 3;
    }
  };

  Ahead ahead_of(int64_t first, int64_t end, const Own& own) const {
    if (first >= end || p_.stride_h != 1 || p_.stride_w != 1 || p_.Q != p_.W) return {};
    const int64_t pixels = min_of(chunk_, end - first), last = chunk_ - 1;
    const T* input = own.input[last] + p_.C;
    Ahead ahead{{{input, input + pixels * p_.C}, {input, input}, {input, input}}, 0};
    // With several ranges of k each thread needs a part of every line.
    if (ranges_ > 1) return ahead;
    for (int i = 0; i < (source_ == nullptr ? 1 : 2); ++i) {
      const T* from =
          source_ == nullptr ? own.grad_output[last] + p_.K : source_->reads[i] + first * p_.K;
      ahead.stretch[1 + i] = {from, from + pixels * p_.K};
    }
    return ahead;
  }

  // A column's share of that: as a tile's rows of the chunk are read, so many bytes are fetched.
  const T* const* fetch(Ahead& ahead, int64_t pixels, int64_t tiles, const Own& own) const {
    if (ahead.ends()) return nullptr;
    for (int64_t i = 0; i < tiles * kTileRows; i += kTileRows) {
      const bool ends = ahead.ends();
      auto& stretch = ahead.stretch[ends ? 2 : ahead.at];
      for (int j = 0; j < kTileRows; ++j) own.ahead[i + j] = stretch.from + j * kLine;
      if (!ends) stretch.from += ceil_div(pixels, stretch_) * kTileRows * kLine;
    }
    return own.ahead;
  }

  // From one pixel to the next, where they lie evenly and can be read there; else 0.
  static int64_t step_of(const Strides4& strides, int64_t height, int64_t width) {
    const bool even = strides.h == width * strides.w && strides.n == height * strides.h;
    return kVectorRegisters == 32 && even ? strides.w : 0;
  }
  int64_t input_step() const {
    return p_.stride_h == 1 && p_.stride_w == 1 && p_.P == p_.H && p_.Q == p_.W
               ? step_of(p_.input, p_.H, p_.W)
               : 0;
  }
  int64_t grad_output_step() const {
    return source_ != nullptr ? p_.K : step_of(p_.output, p_.P, p_.Q);
  }

  void point(int64_t first, int64_t pixels, const Own& own) const {
    int64_t q = first % p_.Q, p = first / p_.Q % p_.P, n = first / p_.Q / p_.P;
    for (int64_t x = 0; x < pixels; ++x) {
      own.grad_output[x] = source_ != nullptr
                               ? own.lines + x * p_.K
                               : grad_output_ + n * p_.output.n + p * p_.output.h + q * p_.output.w;
      own.input[x] =
          input_ + n * p_.input.n + p * p_.stride_h * p_.input.h + q * p_.stride_w * p_.input.w;
      if (++q < p_.Q) continue;
      q = 0;
      if (++p < p_.P) continue;
      p = 0;
      ++n;
    }
  }

  void point_out(int64_t tile0, int64_t tiles, int64_t share, const Own& own) const {
    for (int64_t i = 0; i < (tiles + 1) * kTileRows; ++i) {
      const int64_t row = tile0 * kTileRows + i;
      own.out[i] = row >= rows_ ? own.unused
                   : in_place_  ? grad_weight_ + row * p_.weight.n
                                : sums_ + (share * rows_ + row) * width_;
    }
  }

  // sums[k] += the chunk's grad_output, or =, where nothing came before.
  void add_bias(int64_t pixels, bool starts, T* sums, const Own& own) const {
    int64_t k = 0;
    for (; k + kLanes<T> <= p_.K; k += kLanes<T>) {
      const Vec<T> sum = sum_of_lines<Vec<T>>(k, pixels, own);
      store<T>(sums + k, starts ? sum : load(sums + k) + sum);
    }
    for (; k < p_.K; ++k) {
      const T sum = sum_of_lines<T>(k, pixels, own);
      sums[k] = starts ? sum : sums[k] + sum;
    }
  }

  // Of numbers, or of vectors of them. One sum would wait for itself at every pixel, and its error
  // would grow with each: several run side by side and are added up in pairs.
  template <typename V>
  V sum_of_lines(int64_t k, int64_t pixels, const Own& own) const {
    constexpr int kParts = 8;
    V part[kParts] = {};
    const auto add = [&](int i, int64_t x) {
      V value;
      std::memcpy(&value, own.grad_output[x] + k, sizeof value);
      part[i] += value;
    };
    int64_t x = 0;
    for (; x + kParts <= pixels; x += kParts) {
      for (int i = 0; i < kParts; ++i) add(i, x + i);
    }
    for (int i = 0; x < pixels; ++i, ++x) add(i, x);
    for (int half = kParts / 2; half > 0; half /= 2) {
      for (int i = 0; i < half; ++i) part[i] += part[i + half];
    }
    return part[0];
  }

  void write_bias() const {
    for (int64_t k = 0; k < p_.K; ++k) {
      T sum = bias_sums_[k];
      for (int64_t share = 1; share < shares_; ++share) sum += bias_sums_[share * p_.K + k];
      grad_bias_[k] = sum;
    }
  }

  // Adds up the shares of grad_weight[k, end).
  void write(int64_t k, int64_t end) const {
    if (!swapped_) {
      for (; k < end; ++k) {
        T* sums = add_shares(k, 0, width_);
        std::memcpy(grad_weight_ + k * p_.weight.n, sums, p_.C * sizeof(T));
      }
      return;
    }
    for (int64_t c = 0; c < p_.C; ++c) add_shares(c, k, end);
    transpose_widened(sums_ + k, width_, end - k, p_.C, p_.C, grad_weight_ + k * p_.weight.n,
                      p_.weight.n);
  }

  // Those of columns [begin, end) of a row, into the first share.
  T* add_shares(int64_t row, int64_t begin, int64_t end) const {
    T* sums = sums_ + row * width_;
    for (int64_t share = 1; share < shares_; ++share) {
      const T* more = sums + share * rows_ * width_;
      for (int64_t at = begin; at < end; ++at) sums[at] += more[at];
    }
    return sums;
  }

  const Conv2dProblem& p_;
  const T* grad_output_;
  const T* input_;
  T* grad_weight_;
  T* grad_bias_;
  int threads_;
  int64_t pixels_;
  bool swapped_;  // rows of tiles run over the input's channels, columns over grad_output's
  int64_t width_;
  int64_t shares_, ranges_, chunk_, block_tiles_, stretch_;
  bool in_place_;
  T* sums_;
  T* bias_sums_;
  T* zeros_;
  const ChunkSource* source_ = nullptr;
};

}  // namespace
}  // namespace gdfast::cpu
