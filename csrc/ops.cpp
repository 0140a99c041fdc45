// The operators rlrr_kernels_cpp::linear and ::linear_backward on torch's stable ABI: arguments in, a way chosen,
// outputs allocated. Their fake and autograd kernels are in rlrr_kernels/ops/linear/cpp_backend.py.
#include "arguments.h"

namespace rlrr {
namespace {

// ---------------------------------------------------------------- forward

Tensor linear(const Tensor& x_, const Tensor& weight_, const Tensor& scale_row, const Tensor& scale_col,
              const std::optional<Tensor>& bias, bool residual, int64_t path_) {
  check(x_, "x", 1, weight_, scale_row, scale_col);
  const Operands operands(weight_, scale_row, scale_col, residual);
  const Weight& weight = operands.weight;
  const ScalarType dtype = x_.scalar_type();
  const Type type = type_of(x_, "x");
  const int64_t count = x_.size(0);
  Tensor y = empty({count, weight.rows}, dtype);
  const Path path = checked(path_, choose_forward(processor(), type, weight, count), weight, type, count);
  if (path != Path::library) {
    const Tensor x = with_dense_columns(x_);
    const std::optional<Tensor> wide = bias ? std::optional(dense(*bias, ScalarType::Float)) : std::nullopt;
    const Run all{0, count};
    const Forward call{weight,
                       type,
                       count,
                       {x.const_data_ptr(), x.stride(0)},
                       {wide ? static_cast<const float*>(wide->const_data_ptr()) : nullptr, nullptr},
                       y.mutable_data_ptr(),
                       &all};
    (path == Path::fused ? level().forward_fused : level().forward_panels)(call);
    return y;
  }
  Tensor merged = empty({weight.rows, weight.cols}, dtype);
  level().merge(weight, type, merged.mutable_data_ptr());
  merged = torch::stable::transpose(merged, 0, 1);
  if (bias) {
    const Tensor same = dense(*bias, dtype);
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(y.get(), same.get(), x_.get(), merged.get(), 1, 1));
  } else {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(y.get(), x_.get(), merged.get()));
  }
  return y;
}

// ---------------------------------------------------------------- backward

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_backward(
    const Tensor& grad_y_, const std::optional<Tensor>& x_, const Tensor& weight_, const Tensor& scale_row,
    const Tensor& scale_col, bool residual, bool need_x, bool need_row, bool need_col, bool need_bias, int64_t path_) {
  check(grad_y_, "grad_y", 0, weight_, scale_row, scale_col);
  const bool scales = need_row || need_col;
  const ScalarType dtype = grad_y_.scalar_type();
  const int64_t count = grad_y_.size(0);
  if (scales) check_x(x_, count, weight_.size(1), dtype);
  const Operands operands(weight_, scale_row, scale_col, residual);
  const Weight& weight = operands.weight;
  const Type type = type_of(grad_y_, "grad_y");
  const ScalarType wide = operands.accumulate;

  // Gradients of a sum come expanded, those of a transposed product transposed; every way here reads rows.
  const Tensor grad_y = with_dense_columns(grad_y_);
  const Matrix g{grad_y.const_data_ptr(), grad_y.stride(0)};
  Tensor grad_x = need_x ? empty({count, weight.cols}, dtype) : empty({0}, dtype);
  const ScaleGradient row(need_row, {weight.rows, weight.rank}, wide, scale_row.scalar_type());
  const ScaleGradient col(need_col, {weight.groups, weight.rank, weight.cols}, wide, scale_col.scalar_type());
  Tensor grad_bias = need_bias ? empty({weight.rows}, wide) : empty({0}, wide);
  if (need_bias) level().sum_rows(type, g, count, weight.rows, grad_bias.mutable_data_ptr());

  const Path path = checked(path_, choose_backward(processor(), type, weight, count), weight, type, count);
  if (!scales && !need_x) {
  } else if (count == 0 || weight.rows == 0 || weight.cols == 0) {
    clear(row.out);
    clear(col.out);
    clear(grad_x);
  } else if (path != Path::library) {
    const std::optional<Tensor> x = scales ? std::optional(with_dense_columns(*x_)) : std::nullopt;
    const Backward call{weight,
                        type,
                        count,
                        g,
                        x ? Matrix{x->const_data_ptr(), x->stride(0)} : Matrix{nullptr, 0},
                        need_x ? grad_x.mutable_data_ptr() : nullptr,
                        static_cast<float*>(row.data),
                        static_cast<float*>(col.data)};
    (path == Path::fused ? level().backward_fused : level().backward_panels)(call);
  } else {
    const Tensor scratch = empty({weight.rows, weight.cols}, dtype);  // W', then G
    if (need_x) {
      level().merge(weight, type, scratch.mutable_data_ptr());
      STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(grad_x.get(), grad_y.get(), scratch.get()));
    }
    if (scales) {
      const Tensor across = torch::stable::transpose(grad_y, 0, 1);
      STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(scratch.get(), across.get(), x_->get()));
      level().reduce(weight, type, scratch.const_data_ptr(), row.data, col.data);
    }
  }
  return {grad_x, row.result(), col.result(), grad_bias};
}

// The way that is taken with x or g [M, ...].
int64_t path(const Tensor& rows, const Tensor& weight, int64_t rank, bool backward) {
  return path_of(backward ? choose_backward : choose_forward, rows, weight, rank, rows.size(0));
}

// What the library's products run on: 1 for bf16 in tiles, 2 for float32 in all lanes of AVX-512.
int64_t cpu_library() { return processor().tiles + 2 * processor().wide; }

int64_t cpu_level(int64_t number) {
  STD_TORCH_CHECK(number <= best_level(), "rlrr_kernels_cpp: this processor reaches level ", best_level(), "; got ",
                  number);
  if (number >= 0) set_level(number);
  return current_level();
}

}  // namespace
}  // namespace rlrr

STABLE_TORCH_LIBRARY(rlrr_kernels_cpp, m) {
  m.def(
      "linear(Tensor x, Tensor weight, Tensor scale_row, Tensor scale_col, Tensor? bias=None, bool residual=True, "
      "int path=0) -> Tensor");
  m.def(
      "linear_backward(Tensor grad_y, Tensor? x, Tensor weight, Tensor scale_row, Tensor scale_col, bool residual, "
      "bool need_x, bool need_row, bool need_col, bool need_bias, int path=0) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("path(Tensor rows, Tensor weight, int rank, bool backward) -> int");
  m.def("cpu_level(int number=-1) -> int");
  m.def("cpu_library() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(rlrr_kernels_cpp, CPU, m) {
  m.impl("linear", TORCH_BOX(&rlrr::linear));
  m.impl("linear_backward", TORCH_BOX(&rlrr::linear_backward));
  m.impl("path", TORCH_BOX(&rlrr::path));
}

STABLE_TORCH_LIBRARY_IMPL(rlrr_kernels_cpp, CompositeExplicitAutograd, m) {
  m.impl("cpu_level", TORCH_BOX(&rlrr::cpu_level));
  m.impl("cpu_library", TORCH_BOX(&rlrr::cpu_library));
}
