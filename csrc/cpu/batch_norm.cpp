// Batch normalisation, residual and activation, forward: statistics in one pass over the input,
// everything else in another.
#include "batch_norm.h"

#include "batch_norm_planes.h"
#include "batch_norm_rows.h"
#include "kernels.h"
#include "norm_pieces.h"

namespace gdfast::cpu::GDFAST_ISA {
namespace {

// Mean and invstd of a channel from its sums, and what training keeps of them.
template <typename A>
void finish_statistics(const BatchNormProblem& p, const BatchNormForward& to, double momentum,
                       int64_t c, double shift, double sum, double sum_of_squares) {
  const double count = static_cast<double>(p.N * p.S);
  const double distance = sum / count;
  const double mean = shift + distance;
  double variance = sum_of_squares / count - distance * distance;
  if (variance < 0) variance = 0;  // by rounding; a NaN stays one
  static_cast<A*>(to.mean)[c] = static_cast<A>(mean);
  static_cast<A*>(to.invstd)[c] = static_cast<A>(1 / std::sqrt(variance + p.eps));
  const auto update = [&](void* running, double value) {
    const double before = param_at(running, p.param_dtype, c, 0.0);
    set_param(running, p.param_dtype, c, (1 - momentum) * before + momentum * value);
  };
  if (to.running_mean != nullptr) update(to.running_mean, mean);
  if (to.running_var != nullptr) update(to.running_var, variance * (count / (count - 1)));
}

// What evaluation normalises with.
template <typename A>
void take_running(const BatchNormProblem& p, const BatchNormForward& to) {
  for (int64_t c = 0; c < p.C; ++c) {
    const double variance = param_at(to.running_var, p.param_dtype, c, 1.0);
    static_cast<A*>(to.mean)[c] = param_at(to.running_mean, p.param_dtype, c, A(0));
    static_cast<A*>(to.invstd)[c] = static_cast<A>(1 / std::sqrt(variance + p.eps));
  }
}

template <typename T, template <typename> typename Layout>
void forward(const BatchNormProblem& p, const BatchNormForward& to, bool training, double momentum,
             const BatchNormSums* given, const PixelSource* source, int threads) {
  using A = typename Accumulator<T>::type;
  const Layout<T> layout(p);
  const int64_t columns = layout.columns();
  const bool sums_here = training && given == nullptr;
  const Cut cut = layout.cut(to.residual == nullptr ? 1 : 2, threads);
  const int64_t totals_size = sums_here ? 2 * columns * (cut.by_channel ? 1 : cut.regions) : 0;
  const auto carve = [&](Carver carver) {
    struct Parts {
      double* totals;
      A *origin, *mean, *scale, *bias, *scratch;
      int64_t used;
    } parts;
    parts.totals = carver.take<double>(totals_size);
    parts.origin = carver.take<A>(columns);
    parts.mean = carver.take<A>(columns);
    parts.scale = carver.take<A>(columns);
    parts.bias = carver.take<A>(columns);
    parts.scratch = carver.take<A>(sums_here ? layout.scratch() * threads : 0);
    parts.used = carver.used();
    return parts;
  };
  const Workspace memory(carve(Carver()).used);
  const auto parts = carve(Carver(memory.data()));

  const T* const input = static_cast<const T*>(to.input);
  const T* const residual = static_cast<const T*>(to.residual);
  const A negative_slope = static_cast<A>(p.negative_slope);
  const Factors<A> factors{parts.mean, parts.scale, parts.bias, nullptr, nullptr};

  // Factors of the columns that hold channel c, all of which lie C apart.
  const auto set_factors = [&](int64_t c) {
    const A mean = static_cast<const A*>(to.mean)[c];
    const A scale =
        static_cast<const A*>(to.invstd)[c] * param_at(to.weight, p.param_dtype, c, A(1));
    const A bias = param_at(to.bias, p.param_dtype, c, A(0));
    for (int64_t column = c; column < columns; column += p.C) {
      parts.mean[column] = mean;
      parts.scale[column] = scale;
      parts.bias[column] = bias;
    }
  };
  const bool stream = streams<T>(p, to.output, layout.pitch());
  const auto apply = [&](const Region& region) {
    with_activation(p.activation, [&](auto tag) {
      constexpr Activation kActivation = decltype(tag)::value;
      T* const output = static_cast<T*>(to.output);
      if (residual != nullptr) {
        layout.template apply<kActivation, true>(region, input, residual, factors, negative_slope,
                                                 output, stream);
      } else {
        layout.template apply<kActivation, false>(region, input, residual, factors, negative_slope,
                                                  output, stream);
      }
    });
    if (stream) stream_fence();
  };

  if (!sums_here) {
    if (!training) take_running<A>(p, to);
    for (int64_t c = 0; c < p.C; ++c) {
      if (training) {
        finish_statistics<A>(p, to, momentum, c, given->shift[c], given->sum[c],
                             given->sum_of_squares[c]);
      }
      set_factors(c);
    }
    parallel_for(cut.regions, threads,
                 [&](int64_t index, int) { apply(layout.region(cut, index)); });
    return;
  }
  std::memset(parts.totals, 0, totals_size * sizeof(double));
  if (source != nullptr) source->write(source->self, 0, 1, 0);
  for (int64_t column = 0; column < columns; ++column) {
    const A sample = static_cast<A>(widen(input[layout.sample_of(column % p.C)]));
    parts.origin[column] = std::isfinite(sample) ? sample : A(0);
  }
  run_passes(
      layout, cut, parts.totals, threads,
      [&](const Region& region, const Sums& sums, int thread) {
        layout.for_pieces(region, source != nullptr, [&](const Region& piece) {
          if (source != nullptr) {
            const PixelRange pixels = layout.pixels_of(piece);
            source->write(source->self, pixels.first, pixels.end, thread);
          }
          layout.statistics(piece, input, parts.origin, parts.scratch + thread * layout.scratch(),
                            sums);
        });
      },
      [&](int64_t c, int64_t c_end, const Sums& sums) {
        for (; c < min_of(c_end, p.C); ++c) {
          double first = 0, second = 0;
          for (int64_t column = c; column < columns; column += p.C) {
            first += sums.first[column];
            second += sums.second[column];
          }
          finish_statistics<A>(p, to, momentum, c, static_cast<double>(parts.origin[c]), first,
                               second);
          set_factors(c);
        }
      },
      apply);
}

}  // namespace

void batch_norm(const BatchNormProblem& problem, const BatchNormForward& to, bool training,
                double momentum, const BatchNormSums* sums, int threads) {
  with_dtype(problem.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (problem.channels_last) {
      forward<T, Rows>(problem, to, training, momentum, sums, nullptr, threads);
    } else {
      forward<T, Planes>(problem, to, training, momentum, sums, nullptr, threads);
    }
  });
}

void batch_norm_pieces(const BatchNormProblem& problem, const BatchNormForward& to, double momentum,
                       const PixelSource& source, int threads) {
  forward<float, Rows>(problem, to, true, momentum, nullptr, &source, threads);
}

}  // namespace gdfast::cpu::GDFAST_ISA
