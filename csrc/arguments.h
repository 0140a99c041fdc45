// What the operators take and return on torch's stable ABI: checks, conversions, outputs.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstring>
#include <initializer_list>
#include <optional>
#include <tuple>
#include <vector>

#include "dispatch.h"
#include "levels/levels.h"
#include "runtime.h"

#ifndef STABLE_TORCH_ERROR_CODE_CHECK  // as older headers call it
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

namespace rlrr {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Type type_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Type::f32;
    case ScalarType::BFloat16: return Type::bf16;
    case ScalarType::Half: return Type::f16;
    case ScalarType::Double: return Type::f64;
    default: break;
  }
  STD_TORCH_CHECK(false, "rlrr_kernels_cpp: ", name, " must be float32, float16, bfloat16 or float64");
  return Type::f32;
}

inline Tensor empty(const std::vector<int64_t>& sizes, ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size());
  int64_t step = 1;
  for (int64_t i = static_cast<int64_t>(sizes.size()) - 1; i >= 0; --i) {
    strides[i] = step;
    step *= std::max<int64_t>(sizes[i], 1);
  }
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      sizes.size(), sizes.data(), strides.data(), torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
      aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

inline Tensor with_dense_columns(const Tensor& matrix) {
  return matrix.size(1) <= 1 || matrix.stride(1) == 1 ? matrix : torch::stable::contiguous(matrix);
}

inline Tensor dense(const Tensor& tensor, ScalarType dtype) {
  const Tensor same = tensor.scalar_type() == dtype ? tensor : torch::stable::to(tensor, dtype);
  return same.is_contiguous() ? same : torch::stable::contiguous(same);
}

// The frozen weight with its scales, and the tensors that keep the pointers alive.
struct Operands {
  ScalarType accumulate;
  Tensor data, row, col;
  Weight weight;

  Operands(const Tensor& weight_, const Tensor& scale_row, const Tensor& scale_col, bool residual)
      : accumulate(weight_.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float),
        data(with_dense_columns(weight_)),
        row(dense(scale_row, accumulate)),
        col(dense(scale_col, accumulate)),
        weight{data.const_data_ptr(), type_of(data, "weight"), data.stride(0), row.const_data_ptr(),
               col.const_data_ptr(),  data.size(0),            data.size(1),   row.size(1),
               col.size(0),           residual ? 1.0 : 0.0} {}
};

inline void check(const Tensor& matrix, const char* name, int64_t columns, const Tensor& weight, const Tensor& scale_row,
           const Tensor& scale_col) {
  STD_TORCH_CHECK(weight.dim() == 2, "rlrr_kernels_cpp: weight must be [N, K]");
  STD_TORCH_CHECK(matrix.dim() == 2 && matrix.size(1) == weight.size(columns), "rlrr_kernels_cpp: ", name,
                  " must be [M, ", weight.size(columns), "]");
  STD_TORCH_CHECK(scale_row.dim() == 2 && scale_row.size(0) == weight.size(0) && scale_row.size(1) >= 1,
                  "rlrr_kernels_cpp: scale_row must be [N, r] with N = ", weight.size(0));
  STD_TORCH_CHECK(scale_col.dim() == 3 && scale_col.size(1) == scale_row.size(1) &&
                      scale_col.size(2) == weight.size(1) && scale_col.size(0) >= 1 &&
                      weight.size(0) % scale_col.size(0) == 0,
                  "rlrr_kernels_cpp: scale_col must be [G, r, K] with r = ", scale_row.size(1),
                  ", K = ", weight.size(1), " and G a divisor of N = ", weight.size(0));
  const ScalarType own = matrix.scalar_type(), held = weight.scalar_type();
  const bool half = own == ScalarType::Half || own == ScalarType::BFloat16;
  STD_TORCH_CHECK(own == held || (half && held != ScalarType::Double), "rlrr_kernels_cpp: weight must have the dtype of ",
                  name, ", or be float32 beside 16 bits");
}

// x of a backward whose scale gradients need it.
inline void check_x(const std::optional<Tensor>& x, int64_t count, int64_t columns, ScalarType dtype) {
  STD_TORCH_CHECK(x && x->dim() == 2 && x->size(0) == count && x->size(1) == columns && x->scalar_type() == dtype,
                  "rlrr_kernels_cpp: x must be [M, K] = [", count, ", ", columns,
                  "] of the dtype of grad_y when a scale gradient is needed");
}

// Whether there is anything to compute for the kernels that serve float32 and bfloat16 alone.
inline bool has_kernels(const Weight& weight, Type type, int64_t count) {
  const auto vectors = [](Type t) { return t == Type::f32 || t == Type::bf16; };
  return vectors(type) && vectors(weight.type) && count > 0 && weight.rows > 0 && weight.cols > 0;
}

// The way of `count` rows, of an x or g like `rows`, beside a weight [N, K] under scales of a rank.
inline int64_t path_of(Path (*choose)(const Processor&, Type, const Weight&, int64_t), const Tensor& rows,
                       const Tensor& weight_, int64_t rank, int64_t count) {
  const Type type = type_of(rows, "x");
  Weight weight{};
  weight.type = type_of(weight_, "weight");
  weight.rows = weight_.size(0), weight.cols = weight_.size(1), weight.rank = rank;
  const bool ours = has_kernels(weight, type, count);
  return static_cast<int64_t>(ours ? choose(processor(), type, weight, count) : Path::library);
}

inline Path checked(int64_t path, Path automatic, const Weight& weight, Type type, int64_t count) {
  STD_TORCH_CHECK(path >= 0 && path <= 3, "rlrr_kernels_cpp: path must be 0 to 3; got ", path);
  if (!has_kernels(weight, type, count)) return Path::library;
  return path == 0 ? automatic : static_cast<Path>(path);
}

inline void clear(const Tensor& tensor) {
  const size_t bytes = tensor.numel() * tensor.element_size();
  if (bytes > 0) std::memset(tensor.mutable_data_ptr(), 0, bytes);  // memset refuses the null of an empty tensor
}

// A scale gradient: computed in the accumulation dtype, returned in the dtype of the scale.
struct ScaleGradient {
  Tensor out;
  ScalarType dtype;
  void* data = nullptr;

  ScaleGradient(bool needed, std::initializer_list<int64_t> sizes, ScalarType accumulate, ScalarType dtype_)
      : out(needed ? empty(sizes, accumulate) : empty({0}, dtype_)), dtype(dtype_) {
    if (needed) data = out.mutable_data_ptr();
  }
  Tensor result() const { return out.scalar_type() == dtype ? out : torch::stable::to(out, dtype); }
};

}  // namespace
}  // namespace rlrr
