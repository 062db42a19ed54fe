#include "ddpm_steps.h"

#include "launch.h"

namespace supy {
namespace {

using OptionalTensor = std::optional<TensorView>;
using Tables = std::optional<std::vector<OptionalTensor>>;  // none: every coefficient is a number

constexpr const char* NAMES[] = {"ddpm_add_noise", "ddpm_step", "ddim_step"};
constexpr const char* COEFFICIENTS[3][4] = {
    {"alpha_bar", "beta_bar"}, {"alpha", "beta", "beta_bar", "sigma"}, {"alpha_bar", "alpha_bar_prev", "eta"}};
constexpr int COUNTS[] = {2, 4, 3};

StepType type_of(const TensorView& x, const char* op) {
  switch (x.dtype()) {
    case DType::f32: return StepType::f32;
    case DType::bf16: return StepType::bf16;
    case DType::f16: return StepType::f16;
    default: throw py::type_error(std::string("supy.") + op + ": no kernel for dtype " + name_of(x.dtype()));
  }
}

void* check_like(const OptionalTensor& tensor, const char* op, const char* name, const TensorView& x) {
  if (!tensor) return nullptr;
  SUPY_CHECK(tensor->same_shape(x) && tensor->is_contiguous(), op, name << " must be contiguous and of the shape of x");
  check_dtype(*tensor, op, name, x.dtype());
  check_same_device(*tensor, op, name, x);
  return tensor->data<void>();
}

// Writing over part of what is still to be read would give what no order of the elements means.
void check_overlap(const char* op, const TensorView& out, const OptionalTensor& input) {
  if (!input) return;
  const int64_t bytes = out.numel() * (out.dtype() == DType::f32 ? 4 : 2);
  const char *a = out.data<char>(), *b = input->data<char>();
  const bool fits = a == b || a + bytes <= b || b + bytes <= a;
  SUPY_CHECK(fits, op, "out overlaps an input in part, expected all of it or none");
}

// What the coefficients of one sample must be like; supy/ops says the same for the reference.
void check_values(const StepCoefficients& c, int64_t sample, bool clipped) {
  const int form = static_cast<int>(c.form);
  const char* op = NAMES[form];
  const auto expect = [&](bool holds, int which, const char* expected) {
    SUPY_CHECK(holds, op, COEFFICIENTS[form][which] << " is " << c.at(which, sample) << ", expected " << expected);
  };
  const double a = c.at(0, sample), b = c.at(1, sample);
  if (c.form == StepForm::add_noise) {
    for (int i = 0; i < 2; ++i) expect(std::isfinite(c.at(i, sample)), i, "a finite number");
  } else if (c.form == StepForm::ddpm) {
    const double beta_bar = c.at(2, sample);
    expect(a > 0, 0, "more than 0");
    for (int i = 1; i < 4; ++i) expect(c.at(i, sample) >= 0, i, "at least 0");
    expect(beta_bar > 0 || b == 0, 2, "more than 0 where beta is");
    expect(beta_bar < 1 || !clipped, 2, "less than 1 to predict x0");
  } else {
    const double eta = c.at(2, sample);
    expect(a > 0 && a <= 1, 0, "above 0 to 1");
    expect(b >= 0 && b <= 1, 1, "0 to 1");
    expect(eta >= 0, 2, "at least 0");
    expect(b >= a || eta == 0, 1, "at least alpha_bar where eta is not 0");
    expect(a < 1 || b == 1 || !clipped, 0, "less than 1 to clip x0, unless alpha_bar_prev is 1 too");
  }
}

// The step that all entries share, and the weights of its samples where they are computed here.
struct Step {
  StepParams p{};
  std::vector<StepWeights> weights;
  StepWeights one;

  Step(int form, const TensorView& x, const OptionalTensor& eps, const Tables& tables,
       const std::vector<double>& scalars, const OptionalTensor& limits, std::optional<float> clip, bool noisy) {
    SUPY_CHECK(form >= 0 && form < 3, "ddpm_steps", "form is " << form << ", expected 0 to 2");
    const char* op = NAMES[form];
    const size_t count = COUNTS[form];
    SUPY_CHECK((!tables || tables->size() == count) && scalars.size() == count, op,
               "expected " << count << " coefficients");
    SUPY_CHECK(x.is_contiguous(), op, "x must be contiguous");
    SUPY_CHECK(!clip || *clip > 0, op, "clip is " << *clip << ", expected more than 0");
    SUPY_CHECK(eps.has_value() == (form != 0), op, "eps is missing or too much");
    p.type = type_of(x, op);
    p.x = x.data<void>();
    p.eps = check_like(eps, op, "eps", x);
    p.clipped = clip.has_value();
    p.clip = clip.value_or(0);
    const int64_t batch = x.dim() ? x.size(0) : 1;
    StepCoefficients& c = p.coefficients;
    c.form = static_cast<StepForm>(form);
    bool split = limits.has_value();
    p.shared_weights = true;
    bool readable = true;
    for (size_t i = 0; i < count; ++i) {
      c.scalar[i] = scalars[i];
      if (!tables || !(*tables)[i]) continue;
      const TensorView& table = *(*tables)[i];
      check_same_device(table, op, COEFFICIENTS[form][i], x);
      c.single[i] = table.dtype() == DType::f32;
      if (!c.single[i]) check_dtype(table, op, COEFFICIENTS[form][i], DType::f64);
      c.table[i] = table.data<void>();
      readable = readable && !table.is_cuda();
      if (table.dim() == 0) continue;
      SUPY_CHECK(table.dim() == 1 && table.size(0) == batch && x.dim(), op,
                 COEFFICIENTS[form][i] << " has shape " << table.shape() << ", expected [" << batch << "]");
      c.stride[i] = table.stride(0);
      p.shared_weights = false;
      split = true;
    }
    if (limits) {
      check_dtype(*limits, op, "limits", DType::f32);
      check_same_device(*limits, op, "limits", x);
      SUPY_CHECK(limits->dim() == 1 && limits->size(0) == batch && limits->is_contiguous() && p.clipped && x.dim(), op,
                 "limits has shape " << limits->shape() << ", expected [" << batch << "] and a clip");
      p.limits = limits->data<float>();
    }
    p.samples = split ? batch : 1;
    p.size = p.samples ? x.numel() / p.samples : 0;
    if (!readable) {
      SUPY_CHECK(noisy, op, "the weight of the noise is in GPU memory and not looked at: pass noise or seed");
      return;
    }
    const int64_t rows = p.shared_weights ? 1 : batch;
    if (rows > 1) weights.resize(rows);
    StepWeights* const all = rows > 1 ? weights.data() : &one;
    for (int64_t sample = 0; sample < rows; ++sample) {
      check_values(c, sample, p.clipped);
      all[sample] = step_weights(c, sample, p.clipped);
      SUPY_CHECK(noisy || all[sample].noise == 0, op, "the noise has a weight other than 0: pass noise or seed");
    }
    p.weights = all;
  }
  Step(const Step&) = delete;
};

void philox_normal(const TensorView& out, int64_t seed, int64_t first) {
  SUPY_CHECK(out.is_contiguous(), "philox_normal", "out must be contiguous");
  SUPY_CHECK(first >= 0, "philox_normal", "offset is " << first << ", expected at least 0");
  const NormalParams p{out.data<void>(), type_of(out, "philox_normal"), out.numel(), seed, first};
  if (p.count == 0) return;
  SUPY_LAUNCH(philox_normal, p, out);
}

void steps(int form, const TensorView& x, const OptionalTensor& eps, const OptionalTensor& noise,
           const Tables& tables, const std::vector<double>& scalars, const OptionalTensor& limits,
           std::optional<float> clip, std::optional<int64_t> seed, int64_t first, const TensorView& out,
           const OptionalTensor& made_noise) {
  Step step(form, x, eps, tables, scalars, limits, clip, noise || seed);
  StepParams& p = step.p;
  const char* op = NAMES[form];
  SUPY_CHECK(!noise || !seed, op, "got both noise and seed");
  SUPY_CHECK(first >= 0, op, "offset is " << first << ", expected at least 0");
  p.noise = check_like(noise, op, "noise", x);
  p.out = check_like(out, op, "out", x);
  p.made_noise = check_like(made_noise, op, "made_noise", x);
  p.seeded = seed.has_value();
  p.seed = seed.value_or(0);
  p.first = first;
  for (const OptionalTensor& input : {OptionalTensor(x), eps, noise, made_noise}) check_overlap(op, out, input);
  if (p.samples * p.size == 0) return;
  SUPY_LAUNCH(ddpm_steps, p, x);
}

void steps_backward(int form, const TensorView& grad, const TensorView& x, const OptionalTensor& eps,
                    const Tables& tables, const std::vector<double>& scalars,
                    const OptionalTensor& limits, std::optional<float> clip, const OptionalTensor& dx,
                    const OptionalTensor& deps, const OptionalTensor& dnoise) {
  Step step(form, x, eps, tables, scalars, limits, clip, true);
  const char* op = NAMES[form];
  StepBackwardParams p{};
  p.step = step.p;
  p.grad = check_like(grad, op, "grad", x);
  p.dx = check_like(dx, op, "dx", x);
  p.deps = check_like(deps, op, "deps", x);
  p.dnoise = check_like(dnoise, op, "dnoise", x);
  if (p.step.samples * p.step.size == 0) return;
  SUPY_LAUNCH(ddpm_steps_backward, p, x);
}

void steps_limits(int form, const TensorView& x, const TensorView& eps, const Tables& tables,
                  const std::vector<double>& scalars, float clip, double quantile, const TensorView& limits) {
  Step step(form, x, eps, tables, scalars, limits, clip, true);  // the limits, unset yet, tell it the number of samples
  SUPY_CHECK(quantile >= 0 && quantile <= 1, NAMES[form], "threshold is " << quantile << ", expected 0 to 1");
  const StepLimitsParams p{step.p, quantile, limits.data<float>()};
  if (p.step.samples * p.step.size == 0) return;
  SUPY_LAUNCH(ddpm_steps_limits, p, x);
}

}  // namespace

SUPY_BINDINGS(ddpm_steps, module) {
  module.def("philox_normal", &philox_normal);
  module.def("ddpm_steps", &steps);
  module.def("ddpm_steps_backward", &steps_backward);
  module.def("ddpm_steps_limits", &steps_limits);
}

}  // namespace supy
