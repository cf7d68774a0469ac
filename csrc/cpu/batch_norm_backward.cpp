// The gradients of batch normalisation, residual and activation: sums in one pass over grad_output
// and input, grad_input in another.
//
// With g the gradient before the activation, m(.) the mean over N and S, and x^ the normalised
// input:   grad_bias = sum g, grad_weight = sum g x^,
//          grad_input = invstd weight (g - m(g) - x^ m(g x^))     in training,
//                     = invstd weight g                           in evaluation.
//
// Bytes decide where g comes from. Alone, the activation's argument is computed again from the
// input, which both passes read anyway. With a residual, something more must be read: the output,
// since it is next to the gradient of the layer after this one, that has just read it. Where the
// second pass cannot find all of this in the cache, the first one writes g, which is grad_residual,
// and the second one reads that instead of both.
#include "batch_norm.h"
#include "batch_norm_planes.h"
#include "batch_norm_rows.h"
#include "kernels.h"
#include "norm_pieces.h"

namespace gdfast::cpu::GDFAST_ISA {
namespace {

template <PreActivation kFrom>
struct FromTag {
  static constexpr PreActivation value = kFrom;
};

// Calls f with the tags of the activation and of where its argument comes from: `from`, as far as
// that makes sense for this activation.
template <typename F>
void with_pre_activation(Activation activation, PreActivation from, F&& f) {
  with_activation(activation, [&](auto tag) {
    constexpr Activation kActivation = decltype(tag)::value;
    if constexpr (kActivation == Activation::kNone) {
      f(tag, FromTag<PreActivation::kInput>{});
    } else if (from == PreActivation::kInput) {
      f(tag, FromTag<PreActivation::kInput>{});
    } else if constexpr (kActivation == Activation::kLeakyRelu) {
      if (from == PreActivation::kOutput) return f(tag, FromTag<PreActivation::kOutput>{});
      f(tag, FromTag<PreActivation::kResidual>{});
    } else if constexpr (kActivation == Activation::kSilu) {
      f(tag, FromTag<PreActivation::kResidual>{});
    } else {
      f(tag, FromTag<PreActivation::kOutput>{});
    }
  });
}

template <typename T, template <typename> typename Layout>
auto choose_reduce(Activation activation, PreActivation from) {
  using A = typename Accumulator<T>::type;
  void (Layout<T>::*chosen)(const Region&, const Gradients<T>&, const Factors<A>&, A, bool, A*,
                            const Sums&) const = nullptr;
  with_pre_activation(activation, from, [&](auto tag, auto source) {
    chosen = &Layout<T>::template reduce<decltype(tag)::value, decltype(source)::value>;
  });
  return chosen;
}

template <typename T, template <typename> typename Layout>
auto choose_grad_input(Activation activation, PreActivation from) {
  using A = typename Accumulator<T>::type;
  void (Layout<T>::*chosen)(const Region&, const Gradients<T>&, const Factors<A>&, A, bool, bool)
      const = nullptr;
  with_pre_activation(activation, from, [&](auto tag, auto source) {
    chosen = &Layout<T>::template grad_input<decltype(tag)::value, decltype(source)::value>;
  });
  return chosen;
}

// The second pass, for whoever asks for the gradient of some pixels: they are a table by
// themselves.
struct PixelPass {
  const BatchNormProblem& p;
  const Gradients<float>& gradients;
  const Factors<float>& factors;
  decltype(choose_grad_input<float, Rows>(Activation::kNone, PreActivation::kInput)) run;
  bool training;

  static void write(const void* self, int64_t first, int64_t end, float* to) {
    const PixelPass& pass = *static_cast<const PixelPass*>(self);
    BatchNormProblem piece = pass.p;
    piece.N = 1;
    piece.S = end - first;
    const Rows<float> table(piece);
    const int64_t offset = first * piece.C;
    Gradients<float> at = pass.gradients;
    at.grad_output += offset;
    at.input += offset;
    if (at.other != nullptr) at.other += offset;
    at.grad_input = to;
    (table.*pass.run)(table.whole(), at, pass.factors, static_cast<float>(piece.negative_slope),
                      pass.training, false);
  }
};

template <typename T, template <typename> typename Layout>
void backward(const BatchNormProblem& p, const BatchNormBackward& to, bool training,
              PreActivation from, const GradientUser* user, int threads) {
  using A = typename Accumulator<T>::type;
  const Layout<T> layout(p);
  const int64_t columns = layout.columns();
  const Cut cut = layout.cut(from == PreActivation::kInput ? 2 : 3, threads);
  const int64_t totals_size = 2 * columns * (cut.by_channel ? 1 : cut.regions);
  const auto carve = [&](Carver carver) {
    struct Parts {
      double* totals;
      A *mean, *scale, *bias, *slope, *offset, *scratch;
      int64_t used;
    } parts;
    parts.totals = carver.take<double>(totals_size);
    parts.mean = carver.take<A>(columns);
    parts.scale = carver.take<A>(columns);
    parts.bias = carver.take<A>(columns);
    parts.slope = carver.take<A>(columns);
    parts.offset = carver.take<A>(columns);
    parts.scratch = carver.take<A>(layout.scratch() * threads);
    parts.used = carver.used();
    return parts;
  };
  const Workspace memory(carve(Carver()).used);
  const auto parts = carve(Carver(memory.data()));
  std::memset(parts.totals, 0, totals_size * sizeof(double));

  const A* const invstd = static_cast<const A*>(to.invstd);
  for (int64_t column = 0; column < columns; ++column) {
    const int64_t c = column % p.C;
    parts.mean[column] = static_cast<const A*>(to.mean)[c];
    parts.scale[column] = invstd[c] * param_at(to.weight, p.param_dtype, c, A(1));
    parts.bias[column] = param_at(to.bias, p.param_dtype, c, A(0));
  }
  const Factors<A> factors{parts.mean, parts.scale, parts.bias, parts.slope, parts.offset};
  const A negative_slope = static_cast<A>(p.negative_slope);
  Gradients<T> first_pass{static_cast<const T*>(to.grad_output), static_cast<const T*>(to.input),
                          static_cast<const T*>(to.residual_or_output),
                          static_cast<T*>(to.grad_residual), static_cast<T*>(to.grad_input)};
  Gradients<T> second_pass = first_pass;
  // Whichever pass finds more in the cache writes the residual's gradient: the second one where
  // it reads there what the first one has read, else the first one, and the second reads that.
  const bool written = to.grad_residual != nullptr && (!cut.by_channel || to.grad_input == nullptr);
  if (written) {
    second_pass.grad_output = first_pass.grad_residual;
    second_pass.grad_residual = nullptr;
  } else {
    first_pass.grad_residual = nullptr;
  }
  // In evaluation the first pass serves the parameters and the residual alone.
  const bool reduces = training || written || to.grad_weight != nullptr || to.grad_bias != nullptr;
  const auto reduce = choose_reduce<T, Layout>(p.activation, from);
  const auto grad_input =
      choose_grad_input<T, Layout>(written ? Activation::kNone : p.activation, from);

  const bool stream = streams<T>(p, to.grad_input, layout.pitch()) &&
                      streams<T>(p, to.grad_residual, layout.pitch());
  const auto first = [&](const Region& region, const Sums& sums, int thread) {
    if (!reduces) return;
    (layout.*reduce)(region, first_pass, factors, negative_slope, stream,
                     parts.scratch + thread * layout.scratch(), sums);
    if (stream) stream_fence();
  };
  const auto finish = [&](int64_t c, int64_t c_end, const Sums& sums) {
    const double count = static_cast<double>(p.N * p.S);
    for (; c < min_of(c_end, p.C); ++c) {
      double sum = 0, product = 0;
      for (int64_t column = c; column < columns; column += p.C) {
        sum += sums.first[column];
        product += sums.second[column];
      }
      const double scale = static_cast<double>(invstd[c]);
      set_param(to.grad_bias, p.param_dtype, c, sum);
      set_param(to.grad_weight, p.param_dtype, c, product * scale);
      const double factor = -static_cast<double>(parts.scale[c]) / count;
      for (int64_t column = c; column < columns; column += p.C) {
        parts.slope[column] = static_cast<A>(factor * product * scale * scale);
        parts.offset[column] = static_cast<A>(factor * sum);
      }
    }
  };
  if constexpr (std::is_same<Layout<T>, Rows<float>>::value) {
    if (user != nullptr) {
      run_sums(layout, cut, parts.totals, threads, first, finish);
      const PixelPass pass{p, second_pass, factors, grad_input, training};
      user->run(user->self,
                {PixelPass::write, &pass, {second_pass.grad_output, second_pass.input}});
      return;
    }
  }
  run_passes(layout, cut, parts.totals, threads, first, finish, [&](const Region& region) {
    if (to.grad_input == nullptr) return;
    (layout.*grad_input)(region, second_pass, factors, negative_slope, training, stream);
    if (stream) stream_fence();
  });
}

}  // namespace

void batch_norm_backward(const BatchNormProblem& problem, const BatchNormBackward& to,
                         bool training, PreActivation from, int threads) {
  with_dtype(problem.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (problem.channels_last) {
      backward<T, Rows>(problem, to, training, from, nullptr, threads);
    } else {
      backward<T, Planes>(problem, to, training, from, nullptr, threads);
    }
  });
}

void batch_norm_backward_pieces(const BatchNormProblem& problem, const BatchNormBackward& to,
                                bool training, PreActivation from, const GradientUser& user,
                                int threads) {
  backward<float, Rows>(problem, to, training, from, &user, threads);
}

}  // namespace gdfast::cpu::GDFAST_ISA
