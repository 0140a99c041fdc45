// What every translation unit of the extension agrees on: element types and arguments of the operator.
//
// Included by units compiled for different instruction sets, so nothing here may have code that a linker could merge.
#pragma once

#include <cstdint>

namespace rlrr {

struct bf16 {
  uint16_t bits;
};

struct half {
  uint16_t bits;
};

enum class Type { f32, bf16, f16, f64 };

// W' = W ⊙ (base + s_r s_c).
struct Weight {
  const void* data;  // [rows, cols], columns contiguous
  Type type;
  int64_t stride;   // elements from one row to the next
  const void* row;  // s_r [rows, rank], contiguous; fp32, fp64 beside a float64 weight
  const void* col;  // s_c [groups, rank, cols], contiguous; fp32, fp64 beside a float64 weight
  int64_t rows, cols, rank, groups;
  double base;  // 1 with the residual, else 0

  int64_t group_rows() const { return rows / groups; }
};

// An activation matrix, columns contiguous.
struct Matrix {
  const void* data;
  int64_t stride;
};

// Rows of x and y side by side: [first, first + count).
struct Run {
  int64_t first, count;
};

// What is added to y: b [rows], shared by adapters, and f [rows], an adapter's own; either may be null.
struct Bias {
  const float *shared, *own;
};

struct Forward {
  Weight weight;
  Type type;  // of x and y
  int64_t count;  // M, of all runs together
  Matrix x;           // [.., cols]
  Bias bias;
  void* y;            // [.., rows], contiguous
  const Run* runs;    // where the rows lie in x and y
};

// A null output is one that is not needed.
struct Backward {
  Weight weight;
  Type type;  // of grad_y, x and grad_x
  int64_t count;
  Matrix grad_y;     // [count, rows]
  Matrix x;          // [count, cols]; null when no scale gradient is needed
  void* grad_x;      // [count, cols], contiguous
  float* grad_row;   // [rows, rank]
  float* grad_col;   // [groups, rank, cols]
};

}  // namespace rlrr
