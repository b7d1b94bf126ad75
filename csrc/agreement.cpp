#include "agreement.h"

#include <cstdio>

#include "exchange_kind.h"
#include "wire_format.h"

namespace compressed_ddp {
namespace {

std::string show(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%.17g", value);
  // The shortest text that reads back as the same number: 0.01, not 0.010000000000000000208.
  for (int digits = 1; digits < 17; ++digits) {
    char shorter[32];
    std::snprintf(shorter, sizeof shorter, "%.*g", digits, value);
    double back = 0;
    std::sscanf(shorter, "%lf", &back);
    if (back == value) return shorter;
  }
  return text;
}
std::string show(int64_t value) { return std::to_string(value); }
std::string show_scope(int64_t scope) { return scope == 0 ? "tensor" : scope == 1 ? "bucket" : "chunk"; }
std::string show_value_format(int64_t value) { return name_of(static_cast<ValueFormat>(value)); }
std::string show_exchange(int64_t value) {
  const auto name = [&](int shift) { return std::string(name_of(static_cast<ExchangeKind>(value >> shift & 255))); };
  if (value >> 8 == 0) return name(0);
  return name(0) + " (" + name(8) + " or " + name(16) + ")";
}
std::string show_bool(int64_t value) { return value != 0 ? "True" : "False"; }
std::string show_hash(uint64_t hash) {
  char text[20];
  std::snprintf(text, sizeof text, "%016llx", static_cast<unsigned long long>(hash));
  return text;
}

class Comparison {
 public:
  explicit Comparison(std::span<const AgreementRecord> records) : records_(records) {}

  // `value` reads the field of a record, `text` shows it.
  template <typename Value, typename Text>
  void compare(const char* field, Value&& value, Text&& text) {
    std::string line;
    int shown = 0;
    for (size_t r = 1; r < records_.size(); ++r) {
      if (value(records_[r]) == value(records_[0])) continue;
      if (shown++ < 4) line += ", rank " + std::to_string(r) + " has " + text(records_[r]);
    }
    if (shown == 0) return;
    if (shown > 4) line += ", and " + std::to_string(shown - 4) + " more ranks differ";
    message_ += (message_.empty() ? "" : "; ") + std::string(field) + ": rank 0 has " + text(records_[0]) + line;
  }

  std::string message() && { return std::move(message_); }

 private:
  std::span<const AgreementRecord> records_;
  std::string message_;
};

} // namespace

std::string describe_disagreement(std::span<const AgreementRecord> records) {
  if (records.empty()) return {};
  Comparison all(records);
  using R = const AgreementRecord&;
  // A record of another version cannot be read any further.
  all.compare(
      "version of the agreement record", [](R r) { return r.record_version; },
      [](R r) { return show(static_cast<int64_t>(r.record_version)); });
  std::string details = std::move(all).message();
  if (details.empty()) {
    Comparison fields(records);
    fields.compare(
        "wire format version", [](R r) { return r.wire_version; }, [](R r) { return show(static_cast<int64_t>(r.wire_version)); });
    fields.compare("world_size", [](R r) { return r.world_size; }, [](R r) { return show(r.world_size); });
    fields.compare("step", [](R r) { return r.step; }, [](R r) { return show(r.step); });
    fields.compare("density", [](R r) { return r.density; }, [](R r) { return show(r.density); });
    fields.compare(
        "density is a callable", [](R r) { return r.density_is_callable; }, [](R r) { return show_bool(r.density_is_callable); });
    fields.compare("scope", [](R r) { return r.scope; }, [](R r) { return show_scope(r.scope); });
    fields.compare("value_format", [](R r) { return r.value_format; }, [](R r) { return show_value_format(r.value_format); });
    fields.compare("exchange", [](R r) { return r.exchange; }, [](R r) { return show_exchange(r.exchange); });
    fields.compare("ranks_per_node (0 = by host)", [](R r) { return r.ranks_per_node; }, [](R r) { return show(r.ranks_per_node); });
    fields.compare(
        "costs of exchange='auto' (0 = to be measured)", [](R r) { return r.costs_hash; }, [](R r) { return show_hash(r.costs_hash); });
    fields.compare("error_feedback", [](R r) { return r.error_feedback; }, [](R r) { return show_bool(r.error_feedback); });
    fields.compare("dense_steps", [](R r) { return r.dense_steps; }, [](R r) { return show(r.dense_steps); });
    fields.compare("min_compress_numel", [](R r) { return r.min_compress_numel; }, [](R r) { return show(r.min_compress_numel); });
    fields.compare(
        "exempt (which parameters travel dense)", [](R r) { return r.exempt_hash; }, [](R r) { return show_hash(r.exempt_hash); });
    fields.compare(
        "dtype of the gradient (0 = float32, 1 = float16, 2 = bfloat16)", [](R r) { return r.gradient_type; },
        [](R r) { return show(r.gradient_type); });
    fields.compare("number of parameters in the bucket", [](R r) { return r.num_segments; }, [](R r) { return show(r.num_segments); });
    fields.compare("numel of the bucket", [](R r) { return r.numel; }, [](R r) { return show(r.numel); });
    fields.compare("k (entries selected in the bucket)", [](R r) { return r.selected_numel; }, [](R r) { return show(r.selected_numel); });
    fields.compare("layout of the bucket", [](R r) { return r.structure_hash; }, [](R r) { return show_hash(r.structure_hash); });
    // Buckets may agree one by one and one rank still have more of them.
    bool all_bound = true;
    for (R r : records) all_bound = all_bound && r.model_parameters != 0;
    if (all_bound)
      fields.compare(
          "number of parameters of the model", [](R r) { return r.model_parameters; }, [](R r) { return show(r.model_parameters); });
    bool all_named = true;
    for (R r : records) all_named = all_named && r.names_hash != 0;
    if (all_named)
      fields.compare(
          "names of the parameters in the bucket", [](R r) { return r.names_hash; }, [](R r) { return show_hash(r.names_hash); });
    for (size_t r = 0; r < records.size(); ++r)
      if (records[r].rank != static_cast<int64_t>(r))
        return "the agreement record at position " + std::to_string(r) + " says it comes from rank " + std::to_string(records[r].rank);
    details = std::move(fields).message();
  }
  if (details.empty()) return {};
  const char* name = records[0].bucket;
  return "the ranks disagree before the exchange of the bucket that begins with '" +
         std::string(name, strnlen(name, sizeof records[0].bucket)) + "' (as rank 0 calls it): " + details +
         ". Nothing was sent and no residual changed. Give every rank the same model, options and checkpoint step.";
}

} // namespace compressed_ddp
