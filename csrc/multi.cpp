// The operators rlrr_kernels_cpp::linear_multi and ::linear_multi_backward: rows of x, each under its own of many adapters of
// one W. float32 and bfloat16 alone; rlrr_kernels/ops/multi/cpp_backend.py leaves other calls to one `linear` a task.
#include <algorithm>
#include <vector>

#include "arguments.h"

namespace rlrr {
namespace {

// One adapter's rows, and where they lie.
struct Task {
  int64_t number;  // -1: none, the bare weight
  int64_t count;
  const Run* runs;
};

// The runs [R, 3] of (task, first row, end row), those of one task side by side.
struct Tasks {
  std::vector<Run> runs;
  std::vector<Task> tasks;
  int64_t rows = 0;

  Tasks(const Tensor& given, int64_t count, int64_t adapters) {
    STD_TORCH_CHECK(given.dim() == 2 && given.size(1) == 3 && given.scalar_type() == ScalarType::Long && given.is_contiguous(),
                    "rlrr_kernels_cpp: runs must be [R, 3], contiguous int64");
    const int64_t size = given.size(0);
    const int64_t* from = static_cast<const int64_t*>(given.const_data_ptr());
    runs.reserve(size);
    for (int64_t i = 0; i < size; ++i, from += 3) {
      const int64_t task = from[0], first = from[1], end = from[2];
      STD_TORCH_CHECK(-1 <= task && task < adapters && 0 <= first && first <= end && end <= count,
                      "rlrr_kernels_cpp: runs must be of tasks from -1 to ", adapters - 1, " and of rows up to ", count,
                      "; got ", task, ", ", first, ", ", end);
      if (first == end) continue;
      runs.push_back({first, end - first});
      if (tasks.empty() || tasks.back().number != task) tasks.push_back({task, 0, &runs.back()});
      tasks.back().count += end - first;
      rows += end - first;
    }
    STD_TORCH_CHECK(rows == count, "rlrr_kernels_cpp: runs must cover all ", count, " rows; got ", rows);
  }
};

// Scales [T, N, r] and [T, G, r, K] of a frozen weight.
class Stacks {
 public:
  Stacks(const Tensor& weight, const Tensor& scale_row, const Tensor& scale_col, bool residual)
      : data_(with_dense_columns(weight)), row_(scale_row), col_(scale_col) {
    const auto dense_floats = [](const Tensor& tensor) {
      return tensor.scalar_type() == ScalarType::Float && tensor.is_contiguous();
    };
    STD_TORCH_CHECK(weight.dim() == 2, "rlrr_kernels_cpp: weight must be [N, K]");
    STD_TORCH_CHECK(scale_row.dim() == 3 && scale_row.size(1) == weight.size(0) && scale_row.size(2) >= 1 &&
                        dense_floats(scale_row),
                    "rlrr_kernels_cpp: scale_row must be [T, N, r], contiguous float32, with N = ", weight.size(0));
    STD_TORCH_CHECK(scale_col.dim() == 4 && scale_col.size(0) == scale_row.size(0) &&
                        scale_col.size(2) == scale_row.size(2) && scale_col.size(3) == weight.size(1) &&
                        scale_col.size(1) >= 1 && weight.size(0) % scale_col.size(1) == 0 && dense_floats(scale_col),
                    "rlrr_kernels_cpp: scale_col must be [T, G, r, K], contiguous float32, with the T and r of scale_row, "
                    "K = ", weight.size(1), " and G a divisor of N = ", weight.size(0));
    weight_ = {data_.const_data_ptr(), type_of(data_, "weight"), data_.stride(0), nullptr, nullptr, data_.size(0),
               data_.size(1), row_.size(2), col_.size(1), residual ? 1.0 : 0.0};
    zeros_.resize(std::max(row_size(), col_size()));
  }

  // W' of a task; W itself without one.
  Weight of(int64_t task) const {
    Weight weight = weight_;
    weight.row = task < 0 ? zeros_.data() : static_cast<const float*>(row_.const_data_ptr()) + task * row_size();
    weight.col = task < 0 ? zeros_.data() : static_cast<const float*>(col_.const_data_ptr()) + task * col_size();
    if (task < 0) weight.base = 1;
    return weight;
  }

  const Weight& any() const { return weight_; }
  int64_t row_size() const { return weight_.rows * weight_.rank; }
  int64_t col_size() const { return weight_.groups * weight_.rank * weight_.cols; }

 private:
  Tensor data_, row_, col_;
  Weight weight_;
  std::vector<float> zeros_;
};

void check_kernels(const Weight& weight, Type type, int64_t count) {
  STD_TORCH_CHECK(has_kernels(weight, type, count) && (type == Type::bf16 || weight.type == Type::f32),
                  "rlrr_kernels_cpp: linear_multi takes float32 and bfloat16, or float32 beside bfloat16, and nothing empty");
}

const float* floats(const std::optional<Tensor>& tensor, const char* name, int64_t size) {
  if (!tensor) return nullptr;
  STD_TORCH_CHECK(tensor->numel() == size && tensor->scalar_type() == ScalarType::Float && tensor->is_contiguous(),
                  "rlrr_kernels_cpp: ", name, " must be contiguous float32 of ", size, " elements");
  return static_cast<const float*>(tensor->const_data_ptr());
}

// ---------------------------------------------------------------- forward

// Tasks with many rows: as many whole tasks a thread as there are, else the threads share each.
void forward_tasks(const std::vector<Forward>& calls) {
  int64_t rows = 0;
  for (const Forward& call : calls) rows += call.count;
  const int64_t size = static_cast<int64_t>(calls.size()), workers = worker_count(rows);
  if (workers == 1 || size < 2 * workers) {
    for (const Forward& call : calls) level().forward_panels(call);
    return;
  }
  // Every thread takes as many rows; the task at a border is cut in two, and its W' made twice.
  auto body = [&](int64_t begin, int64_t end) {
    std::vector<Run> runs;
    int64_t before = 0;
    for (const Forward& call : calls) {
      const int64_t first = std::max(begin, before), last = std::min(end, before + call.count);
      runs.clear();
      int64_t at = before;
      for (const Run* run = call.runs; at < before + call.count; at += run->count, ++run) {
        const int64_t from = std::max(first, at), to = std::min(last, at + run->count);
        if (from < to) runs.push_back({run->first + from - at, to - from});
      }
      before += call.count;
      if (first >= last) continue;
      Forward part = call;
      part.count = last - first;
      part.runs = runs.data();
      level().forward_panels(part);
    }
  };
  parallel_slots(
      rows, [](void* context, int64_t, int64_t begin, int64_t end) { (*static_cast<decltype(body)*>(context))(begin, end); },
      &body);
}

Tensor linear_multi(const Tensor& x_, const Tensor& weight_, const Tensor& scale_row, const Tensor& scale_col,
                    const std::optional<Tensor>& bias_, const std::optional<Tensor>& shift_, const Tensor& runs, bool residual,
                    int64_t path_) {
  const Stacks stacks(weight_, scale_row, scale_col, residual);
  const Weight& weight = stacks.any();
  const int64_t last = x_.dim() - 1;
  STD_TORCH_CHECK(last >= 1 && x_.size(last) == weight.cols, "rlrr_kernels_cpp: x must be [.., M, ", weight.cols, "]");
  const Type type = type_of(x_, "x");
  std::vector<int64_t> sizes(last + 1, weight.rows);  // of y
  int64_t count = 1;
  for (int64_t i = 0; i < last; ++i) count *= sizes[i] = x_.size(i);
  check_kernels(weight, type, count);
  STD_TORCH_CHECK(path_ >= 0 && path_ <= 2, "rlrr_kernels_cpp: path of linear_multi must be 0 to 2; got ", path_);
  const Tasks given(runs, count, scale_row.size(0));
  const float *bias = floats(bias_, "bias", weight.rows), *shift = floats(shift_, "shift", scale_row.size(0) * weight.rows);
  Tensor y = empty(sizes, x_.scalar_type());
  const Tensor x = last == 1 ? with_dense_columns(x_) : dense(x_, x_.scalar_type());
  const Matrix rows{x.const_data_ptr(), x.stride(last - 1)};
  std::vector<Forward> few, many;
  for (const Task& task : given.tasks) {
    const float* own = shift == nullptr || task.number < 0 ? nullptr : shift + task.number * weight.rows;
    const Path automatic = choose_forward_of_task(processor(), type, weight, task.count);
    const Path path = path_ == 0 ? automatic : static_cast<Path>(path_);
    (path == Path::fused ? few : many)
        .push_back({stacks.of(task.number), type, task.count, rows, {bias, own},
                    y.mutable_data_ptr(), task.runs});
  }
  if (!few.empty()) level().forward_together(few.data(), few.size());
  forward_tasks(many);
  return y;
}

// ---------------------------------------------------------------- backward

// Whether threads that take whole tasks, as many rows each as can be, are nearly as busy as if they shared every task.
bool balanced(const std::vector<Backward>& calls, int64_t rows, int64_t workers) {
  std::vector<int64_t> loads(workers);
  int64_t before = 0;
  for (const Backward& call : calls) {
    loads[(2 * before + call.count) * workers / (2 * rows)] += call.count;
    before += call.count;
  }
  return workers > 1 && *std::max_element(loads.begin(), loads.end()) * workers * 8 <= rows * 9;
}

void backward_tasks(const std::vector<Backward>& calls) {
  int64_t rows = 0;
  for (const Backward& call : calls) rows += call.count;
  const auto run = [](const Backward& call) {
    const Path path = choose_backward(processor(), call.type, call.weight, call.count);
    (path == Path::fused ? level().backward_fused : level().backward_panels)(call);
  };
  const int64_t workers = worker_count(static_cast<int64_t>(calls.size()));
  if (!balanced(calls, rows, workers)) {
    for (const Backward& call : calls) run(call);
    return;
  }
  auto body = [&](int64_t slot) {
    int64_t before = 0;
    for (const Backward& call : calls) {
      if ((2 * before + call.count) * workers / (2 * rows) == slot) run(call);
      before += call.count;
    }
  };
  parallel_slots(
      workers, [](void* context, int64_t slot, int64_t, int64_t) { (*static_cast<decltype(body)*>(context))(slot); }, &body);
}

// Of grouped rows: each task is one run. Every gradient is float32 but ∂x; adapters without rows have zeros.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> linear_multi_backward(
    const Tensor& grad_y_, const std::optional<Tensor>& x_, const Tensor& weight_, const Tensor& scale_row,
    const Tensor& scale_col, const Tensor& runs, bool residual, bool need_x, bool need_row, bool need_col, bool need_bias,
    bool need_shift) {
  const Stacks stacks(weight_, scale_row, scale_col, residual);
  const Weight& weight = stacks.any();
  STD_TORCH_CHECK(grad_y_.dim() == 2 && grad_y_.size(1) == weight.rows, "rlrr_kernels_cpp: grad_y must be [M, ", weight.rows,
                  "]");
  const Type type = type_of(grad_y_, "grad_y");
  const int64_t count = grad_y_.size(0), adapters = scale_row.size(0);
  check_kernels(weight, type, count);
  const bool scales = need_row || need_col;
  if (scales) check_x(x_, count, weight.cols, grad_y_.scalar_type());
  const Tasks given(runs, count, adapters);
  STD_TORCH_CHECK(given.runs.size() == given.tasks.size(), "rlrr_kernels_cpp: the rows of a task must be side by side");
  const ScalarType f32 = ScalarType::Float;
  const Tensor grad_y = with_dense_columns(grad_y_);
  const std::optional<Tensor> x = scales ? std::optional(with_dense_columns(*x_)) : std::nullopt;
  Tensor grad_x = need_x ? empty({count, weight.cols}, grad_y_.scalar_type()) : empty({0}, f32);
  Tensor grad_row = need_row ? empty({adapters, weight.rows, weight.rank}, f32) : empty({0}, f32);
  Tensor grad_col = need_col ? empty({adapters, weight.groups, weight.rank, weight.cols}, f32) : empty({0}, f32);
  Tensor grad_bias = need_bias ? empty({weight.rows}, f32) : empty({0}, f32);
  Tensor grad_shift = need_shift ? empty({adapters, weight.rows}, f32) : empty({0}, f32);
  for (const Tensor* tensor : {&grad_row, &grad_col, &grad_shift}) clear(*tensor);
  std::vector<float> sums(weight.rows);     // Σ g of a task without f
  std::vector<double> totals(weight.rows);  // and of all, whose order must not lose to eager's
  std::vector<Backward> calls;
  for (const Task& task : given.tasks) {
    const auto rows_of = [&](const Tensor& matrix) {
      return Matrix{static_cast<const char*>(matrix.const_data_ptr()) +
                        task.runs->first * matrix.stride(0) * static_cast<int64_t>(matrix.element_size()),
                    matrix.stride(0)};
    };
    const auto slice = [&](const Tensor& stack, int64_t place, int64_t size) -> void* {
      return static_cast<char*>(stack.mutable_data_ptr()) + place * size * static_cast<int64_t>(stack.element_size());
    };
    const Matrix g = rows_of(grad_y);
    const bool trained = task.number >= 0;
    if (need_bias || (need_shift && trained)) {
      float* own = need_shift && trained ? static_cast<float*>(slice(grad_shift, task.number, weight.rows)) : sums.data();
      level().sum_rows(type, g, task.count, weight.rows, own);
      for (int64_t n = 0; n < weight.rows; ++n) totals[n] += own[n];
    }
    const bool row = need_row && trained, col = need_col && trained;
    if (!need_x && !row && !col) continue;
    calls.push_back({stacks.of(task.number), type, task.count, g, row || col ? rows_of(*x) : Matrix{nullptr, 0},
                     need_x ? slice(grad_x, task.runs->first, weight.cols) : nullptr,
                     row ? static_cast<float*>(slice(grad_row, task.number, stacks.row_size())) : nullptr,
                     col ? static_cast<float*>(slice(grad_col, task.number, stacks.col_size())) : nullptr});
  }
  if (need_bias) std::copy(totals.begin(), totals.end(), static_cast<float*>(grad_bias.mutable_data_ptr()));
  backward_tasks(calls);
  return {grad_x, grad_row, grad_col, grad_bias, grad_shift};
}

// The way that `count` rows of one adapter take, of an x or g [M, ...]; library: linear_multi knows none.
int64_t path_of_task(const Tensor& rows, const Tensor& weight, int64_t rank, int64_t count, bool backward) {
  return path_of(backward ? choose_backward : choose_forward_of_task, rows, weight, rank, count);
}

}  // namespace
}  // namespace rlrr

STABLE_TORCH_LIBRARY_FRAGMENT(rlrr_kernels_cpp, m) {
  m.def(
      "linear_multi(Tensor x, Tensor weight, Tensor scale_row, Tensor scale_col, Tensor? bias, Tensor? shift, Tensor runs, "
      "bool residual, int path=0) -> Tensor");
  m.def(
      "linear_multi_backward(Tensor grad_y, Tensor? x, Tensor weight, Tensor scale_row, Tensor scale_col, Tensor runs, "
      "bool residual, bool need_x, bool need_row, bool need_col, bool need_bias, bool need_shift) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("path_of_task(Tensor rows, Tensor weight, int rank, int count, bool backward) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(rlrr_kernels_cpp, CPU, m) {
  m.impl("linear_multi", TORCH_BOX(&rlrr::linear_multi));
  m.impl("linear_multi_backward", TORCH_BOX(&rlrr::linear_multi_backward));
  m.impl("path_of_task", TORCH_BOX(&rlrr::path_of_task));
}
