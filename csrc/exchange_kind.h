// The exchanges by name. Torch-free; exchange.h has what they do.
#pragma once

#include <cstdint>
#include <optional>
#include <string_view>

namespace compressed_ddp {

enum class ExchangeKind : int64_t {
  kAllGather = 0,
  kSplit = 1,
  kDense = 2,        // in the gradient's own type
  kDenseFloat32 = 3, // in the one that its name says
  kDenseBFloat16 = 4,
  kDenseFloat16 = 5,
  kHierarchical = 6,
  kAuto = 7, // of a state: one of the others for each bucket (exchange_auto.h)
};

struct ExchangeName {
  ExchangeKind kind;
  std::string_view name;
};
inline constexpr ExchangeName kExchangeNames[] = {
    {ExchangeKind::kAllGather, "allgather"},
    {ExchangeKind::kSplit, "split"},
    {ExchangeKind::kDense, "dense"},
    {ExchangeKind::kDenseFloat32, "dense_fp32"},
    {ExchangeKind::kDenseBFloat16, "dense_bf16"},
    {ExchangeKind::kDenseFloat16, "dense_fp16"},
    {ExchangeKind::kHierarchical, "hierarchical"},
    {ExchangeKind::kAuto, "auto"},
};

constexpr std::string_view name_of(ExchangeKind kind) {
  for (const ExchangeName& known : kExchangeNames)
    if (known.kind == kind) return known.name;
  return "an unknown one";
}

constexpr std::optional<ExchangeKind> exchange_kind_of(std::string_view name) {
  for (const ExchangeName& known : kExchangeNames)
    if (known.name == name) return known.kind;
  return std::nullopt;
}

// kAuto and what belongs to it as one number, which ranks compare.
constexpr int64_t auto_exchange_number(ExchangeKind sparse, ExchangeKind dense) {
  return static_cast<int64_t>(ExchangeKind::kAuto) | static_cast<int64_t>(sparse) << 8 | static_cast<int64_t>(dense) << 16;
}

// Averages of whole gradients: no payload, no selection.
constexpr bool is_dense(ExchangeKind kind) { return kind >= ExchangeKind::kDense && kind <= ExchangeKind::kDenseFloat16; }

// What a state does that names no exchange, and what hierarchical does between nodes. A function of the number of senders alone, so that
// runs repeat.
inline constexpr int64_t kAllGatherRanks = 16;
constexpr ExchangeKind default_exchange(int64_t num_senders) {
  return num_senders <= kAllGatherRanks ? ExchangeKind::kAllGather : ExchangeKind::kSplit;
}

// Of one bucket and step. hierarchical: two, and those between nodes.
constexpr int num_collectives(ExchangeKind kind) { return kind == ExchangeKind::kSplit ? 2 : 1; }

} // namespace compressed_ddp
