// The stages as torch.ops.compressed_ddp.*: checks, then the torch-free core under at::parallel_for. Schemas may change until 1.0.
// python/compressed_ddp/ops.py documents them and holds the fake kernels.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <functional>

#include "cpu/compensate_select.h"
#include "cpu/decode.h"
#include "cpu/decode_apply.h"
#include "cpu/encode.h"
#include "cpu/restore.h"
#include "gradient_type.h"
#include "parallel_for.h"
#include "wire_format.h"

namespace compressed_ddp {
namespace {

Layout make_layout(const char* op, at::IntArrayRef segments, at::IntArrayRef groups, at::IntArrayRef k,
                   c10::string_view value_format = "fp32") {
  try {
    return Layout::make({segments.data(), segments.size()}, {groups.data(), groups.size()}, {k.data(), k.size()},
                        value_format_of({value_format.data(), value_format.size()}));
  } catch (const std::invalid_argument& error) {
    TORCH_CHECK_VALUE(false, op, ": ", error.what());
  }
}

void check_flat(const char* op, const char* argument, const at::Tensor& tensor, int64_t numel) {
  TORCH_CHECK_VALUE(tensor.dim() == 1 && tensor.is_contiguous() && tensor.numel() == numel, op, ": expected ", argument,
                    " to be flat and contiguous with ", numel, " entries (the sum of segments), got shape ", tensor.sizes(),
                    " with strides ", tensor.strides());
}

void check_type(const char* op, const char* argument, const at::Tensor& tensor, at::ScalarType type) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == type, op, ": expected ", argument, " to have dtype ", type, ", got ", tensor.scalar_type());
}

std::vector<float*> segment_residuals(const Layout& layout, const at::Tensor& residual) {
  std::vector<float*> pointers;
  auto* data = residual.mutable_data_ptr<float>();
  for (const Segment& segment : layout.segments) pointers.push_back(data + segment.offset);
  return pointers;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> compensate_select_cpu(const at::Tensor& gradient, at::Tensor& residual,
                                                                     at::IntArrayRef segments, at::IntArrayRef groups, at::IntArrayRef k,
                                                                     bool error_feedback) {
  constexpr auto op = "compensate_select_";
  const Layout layout = make_layout(op, segments, groups, k);
  check_flat(op, "gradient", gradient, layout.numel);
  check_flat(op, "residual", residual, layout.numel);
  check_type(op, "residual", residual, at::kFloat);
  at::Tensor values = at::empty({layout.selected_numel}, gradient.options().dtype(at::kFloat));
  at::Tensor indices = at::empty({layout.selected_numel}, gradient.options().dtype(at::kInt));
  const std::vector<float*> residuals = segment_residuals(layout, residual);
  CompensateSelect plan(layout);
  static thread_local CompensateSelect::Scratch scratch; // kept, as the engine keeps its own: fresh pages cost a third of the pass
  plan.use_scratch(scratch);
  const CompensateSelectArguments arguments{
      gradient.const_data_ptr(),           gradient_type(gradient),         error_feedback ? residuals.data() : nullptr, nullptr,
      indices.mutable_data_ptr<int32_t>(), values.mutable_data_ptr<float>()};
  const CompensateSelectStatistics sums = compensate_select(plan, arguments, torch_parallel_for);
  at::Tensor statistics = at::empty({4}, gradient.options().dtype(at::kDouble));
  auto* out = statistics.mutable_data_ptr<double>();
  out[0] = sums.gradient_sq;
  out[1] = sums.residual_sq;
  out[2] = sums.sent_sq;
  out[3] = static_cast<double>(sums.non_finite);
  return {values, indices, statistics};
}

void check_bytes(const char* op, const char* argument, const at::Tensor& payloads) {
  check_type(op, argument, payloads, at::kByte);
  TORCH_CHECK_VALUE(reinterpret_cast<uintptr_t>(payloads.const_data_ptr()) % alignof(uint64_t) == 0, op, ": expected ", argument,
                    " to be aligned to 8 bytes; clone() it");
}

// Of ascending indices inside the bucket. A group may span dense segments, whose entries are none of its own.
void check_not_dense(const char* op, const Layout& layout, const int32_t* indices) {
  size_t s = 0;
  for (int64_t entry = 0; entry < layout.selected_numel; ++entry) {
    while (layout.segments[s].offset + layout.segments[s].numel <= indices[entry]) ++s;
    TORCH_CHECK_VALUE(layout.segments[s].group != kDenseGroup, op, ": index ", indices[entry],
                      " lies in a dense segment; expected what compensate_select_ returned");
  }
}

at::Tensor encode_cpu(const at::Tensor& values, const at::Tensor& indices, const at::Tensor& gradient, at::IntArrayRef segments,
                      at::IntArrayRef groups, at::IntArrayRef k, c10::string_view value_format, const std::optional<at::Tensor>& residual,
                      int64_t rank, int64_t step, bool non_finite) {
  constexpr auto op = "encode";
  const Layout layout = make_layout(op, segments, groups, k, value_format);
  check_flat(op, "gradient", gradient, layout.numel);
  check_type(op, "values", values, at::kFloat);
  check_type(op, "indices", indices, at::kInt);
  TORCH_CHECK_VALUE(values.dim() == 1 && values.is_contiguous() && values.numel() == layout.selected_numel && indices.dim() == 1 &&
                        indices.is_contiguous() && indices.numel() == layout.selected_numel,
                    op, ": expected flat contiguous values and indices with ", layout.selected_numel,
                    " entries (the sum of k), got shapes ", values.sizes(), " and ", indices.sizes());
  TORCH_CHECK_VALUE(rank >= 0, op, ": expected rank >= 0, got ", rank);
  const auto* positions = indices.const_data_ptr<int32_t>();
  TORCH_CHECK_VALUE(std::is_sorted(positions, positions + layout.selected_numel, std::less_equal<>()), op,
                    ": expected indices to ascend strictly, as compensate_select_ returns them");
  const std::string problem = check_groups(layout, positions);
  TORCH_CHECK_VALUE(problem.empty(), op, ": ", problem, "; expected what compensate_select_ returned");
  check_not_dense(op, layout, positions);
  std::vector<float*> residuals;
  if (residual.has_value()) {
    check_flat(op, "residual", *residual, layout.numel);
    check_type(op, "residual", *residual, at::kFloat);
    residuals = segment_residuals(layout, *residual);
  }
  at::Tensor payload = at::empty({payload_bytes(layout)}, gradient.options().dtype(at::kByte));
  auto* bytes = payload.mutable_data_ptr<uint8_t>();
  const EncodeStatistics dense = encode_dense(layout, gradient.const_data_ptr(), gradient_type(gradient), nullptr, bytes);
  const auto* numbers = values.const_data_ptr<float>();
  const bool any_non_finite = non_finite || dense.non_finite > 0 || std::any_of(numbers, numbers + layout.selected_numel, [](float value) {
                                return !is_finite_key(selection_key(value));
                              });
  encode_selected(layout, {numbers, positions, residual.has_value() ? residuals.data() : nullptr, any_non_finite, bytes},
                  torch_parallel_for);
  encode_header(layout, rank, step, any_non_finite, bytes);
  return payload;
}

void decode_apply_cpu(at::Tensor& bucket, const at::Tensor& gathered, at::IntArrayRef segments, at::IntArrayRef groups, at::IntArrayRef k,
                      c10::string_view value_format, int64_t step) {
  constexpr auto op = "decode_apply_";
  const Layout layout = make_layout(op, segments, groups, k, value_format);
  check_flat(op, "bucket", bucket, layout.numel);
  check_bytes(op, "gathered", gathered);
  TORCH_CHECK_VALUE(gathered.dim() == 2 && gathered.is_contiguous() && gathered.size(0) >= 1 && gathered.size(1) == payload_bytes(layout),
                    op, ": expected gathered to be contiguous [world_size, ", payload_bytes(layout), "], got ", gathered.sizes());
  const auto* bytes = gathered.const_data_ptr<uint8_t>();
  const std::string problem = check_payloads(layout, bytes, gathered.size(0), {0}, step, torch_parallel_for);
  TORCH_CHECK_VALUE(problem.empty(), op, ": ", problem, "; the bucket is unchanged");
  decode_apply(layout, {bytes, gathered.size(0), bucket.mutable_data_ptr(), gradient_type(bucket)}, torch_parallel_for);
}

void restore_cpu(at::Tensor& residual, const at::Tensor& payload, at::IntArrayRef segments, at::IntArrayRef groups, at::IntArrayRef k,
                 c10::string_view value_format) {
  constexpr auto op = "restore_";
  const Layout layout = make_layout(op, segments, groups, k, value_format);
  check_flat(op, "residual", residual, layout.numel);
  check_type(op, "residual", residual, at::kFloat);
  check_bytes(op, "payload", payload);
  TORCH_CHECK_VALUE(payload.dim() == 1 && payload.is_contiguous() && payload.numel() == payload_bytes(layout), op,
                    ": expected payload to be flat and contiguous with ", payload_bytes(layout), " bytes, got ", payload.sizes());
  Entries entries;
  const std::string problem = decode_own(layout, payload.const_data_ptr<uint8_t>(), entries, torch_parallel_for);
  TORCH_CHECK_VALUE(problem.empty(), op, ": the payload does not fit the layout (", problem, "); the residual is unchanged");
  restore(layout, entries, segment_residuals(layout, residual).data());
}

} // namespace

TORCH_LIBRARY(compressed_ddp, m) {
  m.def(
      "compensate_select_(Tensor gradient, Tensor(a!) residual, SymInt[] segments, int[] groups, SymInt[] k, *, bool error_feedback=True) "
      "-> (Tensor values, Tensor indices, Tensor statistics)");
  m.def(
      "encode(Tensor values, Tensor indices, Tensor gradient, SymInt[] segments, int[] groups, SymInt[] k, *, str value_format='bf16', "
      "Tensor(a!)? residual=None, int rank, int step=0, bool non_finite=False) -> Tensor");
  m.def(
      "decode_apply_(Tensor(a!) bucket, Tensor gathered, SymInt[] segments, int[] groups, SymInt[] k, *, str value_format='bf16', "
      "int step=0) -> ()");
  m.def("restore_(Tensor(a!) residual, Tensor payload, SymInt[] segments, int[] groups, SymInt[] k, *, str value_format='bf16') -> ()");
}

TORCH_LIBRARY_IMPL(compressed_ddp, CPU, m) {
  m.impl("compensate_select_", compensate_select_cpu);
  m.impl("encode", encode_cpu);
  m.impl("decode_apply_", decode_apply_cpu);
  m.impl("restore_", restore_cpu);
}

} // namespace compressed_ddp
