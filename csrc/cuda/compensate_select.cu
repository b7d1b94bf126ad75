#include "compensate_select.h"

#include "compensate_select_emit.cuh"
#include "encode_lost.cuh"
#include "launch.h"

namespace compressed_ddp::cuda {
namespace {

void checked_launch(const char* kernel) { check(cudaGetLastError(), kernel); }

// Small groups alone: no kernel runs before the first entry.
void clear_bits_without_kernel(const DevicePlan& plan, const SelectArguments& a, cudaStream_t stream) {
  const auto clear = [&](int64_t offset, int64_t bytes) {
    if (bytes > 0) check(cudaMemsetAsync(a.payload + offset, 0, static_cast<size_t>(bytes), stream), "clearing the payload's bits");
  };
  clear(plan.sections.high, 8 * plan.high_words);
  if (plan.value_format == ValueFormat::kSign) clear(plan.sections.values, (plan.selected_numel + 31) / 32 * 4);
}

template <typename gradient_t>
void load(ValueFormat value_format) {
  const auto one = [](auto* kernel) {
    cudaFuncAttributes attributes;
    check(cudaFuncGetAttributes(&attributes, kernel), "loading compensate_select");
  };
  one(guess_kernel<gradient_t>);
  one(filter_kernel<gradient_t, false>);
  one(filter_kernel<gradient_t, true>);
  one(histogram_kernel<gradient_t, false>);
  one(histogram_kernel<gradient_t, true>);
  one(small_kernel<gradient_t>);
  one(refine_kernel<gradient_t>);
  with_value_format(value_format, [&](auto format) { one(emit_kernel<gradient_t, format.value>); });
  one(encode_lost_kernel);
}

template <typename gradient_t>
void enqueue(const DevicePlan& plan, const SelectArguments& a, Method method, cudaStream_t stream) {
  const bool one_pass = plan.num_tiles > 0 && method == Method::kOnePass;
  if (plan.num_tiles == 0) clear_bits_without_kernel(plan, a, stream);
  if (one_pass) {
    guess_kernel<gradient_t><<<plan.num_runs + 1, kThreads, 0, stream>>>(plan, a);
    checked_launch("compensate_select_guess");
    filter_kernel<gradient_t, false><<<plan.num_tiles, kThreads, 0, stream>>>(plan, a);
    checked_launch("compensate_select_filter");
    histogram_kernel<gradient_t, true><<<plan.num_runs + plan.num_small_groups, kThreads, 0, stream>>>(plan, a);
    checked_launch("compensate_select_histogram, again");
  } else if (plan.num_tiles > 0) {
    histogram_kernel<gradient_t, false><<<plan.num_runs + 1, kThreads, 0, stream>>>(plan, a);
    checked_launch("compensate_select_histogram");
  }
  if (!one_pass && plan.num_small_groups > 0) {
    small_kernel<gradient_t><<<plan.num_small_groups, kThreads, 0, stream>>>(plan, a);
    checked_launch("compensate_select_small");
  }
  if (plan.num_tiles > 0) {
    filter_kernel<gradient_t, true><<<plan.num_tiles, kThreads, 0, stream>>>(plan, a);
    checked_launch("compensate_select_filter, again");
    refine_kernel<gradient_t><<<plan.num_runs, kThreads, 0, stream>>>(plan, a);
    checked_launch("compensate_select_refine");
  }
  const int emit_blocks = plan.num_runs + plan.num_dense_tiles + 1;
  with_value_format(plan.value_format,
                    [&](auto format) { emit_kernel<gradient_t, format.value><<<emit_blocks, kThreads, 0, stream>>>(plan, a); });
  checked_launch("compensate_select_emit");
  if (plan.value_format == ValueFormat::kSign && a.residuals != nullptr && plan.selected_numel > 0) {
    encode_lost_kernel<<<static_cast<unsigned>(plan.sections.directory_numel), kThreads, 0, stream>>>(plan, a);
    checked_launch("encode_lost");
  }
}

} // namespace

void compensate_select_and_encode(const DevicePlan& plan, const SelectArguments& arguments, Method method, cudaStream_t stream) {
  with_gradient_type(arguments.type, [&](auto gradient) { enqueue<decltype(gradient)>(plan, arguments, method, stream); });
}

void load_compensate_select(GradientType type, ValueFormat value_format) {
  with_gradient_type(type, [&](auto gradient) { load<decltype(gradient)>(value_format); });
}

cudaError_t try_compensate_select() {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, emit_kernel<float, ValueFormat::kFloat32>);
}

void clear_workspace(const Plan& plan, void* workspace, cudaStream_t stream) {
  check(cudaMemsetAsync(workspace, 0, static_cast<size_t>(plan.workspace_cleared_bytes()), stream), "clearing the workspace");
}

} // namespace compressed_ddp::cuda
