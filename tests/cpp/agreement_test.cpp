#include "agreement.h"

#include <cmath>

#include "exchange_kind.h"
#include "testing.h"

namespace compressed_ddp {
namespace {

AgreementRecord record_of(int64_t rank, int64_t world_size) {
  AgreementRecord record;
  record.wire_version = 1;
  record.rank = rank;
  record.world_size = world_size;
  record.step = 7;
  record.density = 0.01;
  record.dense_steps = 2;
  record.min_compress_numel = 1024;
  record.error_feedback = 1;
  record.numel = 5000;
  record.num_segments = 3;
  record.selected_numel = 50;
  record.model_parameters = 6;
  record.structure_hash = 0xabcdef;
  record.exempt_hash = 0x11;
  record.names_hash = 0x22;
  std::strcpy(record.bucket, "layers.0.weight");
  return record;
}

std::vector<AgreementRecord> agreeing(int64_t world_size) {
  std::vector<AgreementRecord> records;
  for (int64_t rank = 0; rank < world_size; ++rank) records.push_back(record_of(rank, world_size));
  return records;
}

void expect_contains(const std::string& message, const std::string& words) {
  EXPECT_NE(message.find(words), std::string::npos) << "\"" << words << "\" is not in: " << message;
}

TEST(Agreement, EqualRecordsGiveNoMessage) {
  EXPECT_EQ(describe_disagreement({}), "");
  for (const int64_t world_size : {1, 2, 8}) EXPECT_EQ(describe_disagreement(agreeing(world_size)), "");
}

TEST(Agreement, EachFieldIsNamedWithTheValueOfEitherRank) {
  struct Field {
    std::string words;
    std::function<void(AgreementRecord&)> change;
  };
  const std::vector<Field> fields = {
      {"wire format version: rank 0 has 1, rank 2 has 9", [](auto& r) { r.wire_version = 9; }},
      {"world_size: rank 0 has 4, rank 2 has 5", [](auto& r) { r.world_size = 5; }},
      {"step: rank 0 has 7, rank 2 has 8", [](auto& r) { r.step = 8; }},
      {"density: rank 0 has 0.01, rank 2 has 0.1", [](auto& r) { r.density = 0.1; }},
      {"density is a callable: rank 0 has False, rank 2 has True", [](auto& r) { r.density_is_callable = 1; }},
      {"scope: rank 0 has tensor, rank 2 has bucket", [](auto& r) { r.scope = 1; }},
      {"exchange: rank 0 has allgather, rank 2 has hierarchical",
       [](auto& r) { r.exchange = static_cast<int64_t>(ExchangeKind::kHierarchical); }},
      {"exchange: rank 0 has allgather, rank 2 has auto (split or dense)",
       [](auto& r) { r.exchange = auto_exchange_number(ExchangeKind::kSplit, ExchangeKind::kDense); }},
      {"ranks_per_node (0 = by host): rank 0 has 0, rank 2 has 8", [](auto& r) { r.ranks_per_node = 8; }},
      {"costs of exchange='auto' (0 = to be measured): rank 0 has 0000000000000000, rank 2 has 0000000000000033",
       [](auto& r) { r.costs_hash = 0x33; }},
      {"error_feedback: rank 0 has True, rank 2 has False", [](auto& r) { r.error_feedback = 0; }},
      {"dense_steps: rank 0 has 2, rank 2 has 0", [](auto& r) { r.dense_steps = 0; }},
      {"min_compress_numel: rank 0 has 1024, rank 2 has 1", [](auto& r) { r.min_compress_numel = 1; }},
      {"exempt (which parameters travel dense): rank 0 has 0000000000000011, rank 2 has 0000000000000012",
       [](auto& r) { r.exempt_hash = 0x12; }},
      {"dtype of the gradient (0 = float32, 1 = float16, 2 = bfloat16): rank 0 has 0, rank 2 has 2", [](auto& r) { r.gradient_type = 2; }},
      {"number of parameters in the bucket: rank 0 has 3, rank 2 has 4", [](auto& r) { r.num_segments = 4; }},
      {"numel of the bucket: rank 0 has 5000, rank 2 has 5001", [](auto& r) { r.numel = 5001; }},
      {"k (entries selected in the bucket): rank 0 has 50, rank 2 has 51", [](auto& r) { r.selected_numel = 51; }},
      {"layout of the bucket: rank 0 has 0000000000abcdef, rank 2 has 0000000000abcdee", [](auto& r) { r.structure_hash = 0xabcdee; }},
      {"number of parameters of the model: rank 0 has 6, rank 2 has 7", [](auto& r) { r.model_parameters = 7; }},
      {"names of the parameters in the bucket: rank 0 has 0000000000000022, rank 2 has 0000000000000023",
       [](auto& r) { r.names_hash = 0x23; }},
  };
  for (const Field& field : fields) {
    std::vector<AgreementRecord> records = agreeing(4);
    field.change(records[2]);
    const std::string message = describe_disagreement(records);
    expect_contains(message, "'layers.0.weight' (as rank 0 calls it): " + field.words + ". ");
    expect_contains(message, "Nothing was sent and no residual changed.");
    expect_contains(message, "Give every rank the same model, options and checkpoint step.");
  }
}

TEST(Agreement, AllDifferingFieldsAreListed) {
  std::vector<AgreementRecord> records = agreeing(2);
  records[1].step = 0;
  records[1].density = 0.5;
  const std::string message = describe_disagreement(records);
  expect_contains(message, "step: rank 0 has 7, rank 1 has 0; density: rank 0 has 0.01, rank 1 has 0.5");
}

TEST(Agreement, EveryDifferingRankIsListedUpToFour) {
  std::vector<AgreementRecord> records = agreeing(5);
  for (size_t rank = 1; rank < 5; ++rank) records[rank].dense_steps = static_cast<int64_t>(10 * rank);
  expect_contains(describe_disagreement(records),
                  "dense_steps: rank 0 has 2, rank 1 has 10, rank 2 has 20, rank 3 has 30, rank 4 has 40. ");
}

TEST(Agreement, ManyDifferingRanksAreSummarised) {
  std::vector<AgreementRecord> records = agreeing(64);
  for (AgreementRecord& record : records) record.step = record.rank;
  const std::string message = describe_disagreement(records);
  expect_contains(message, "step: rank 0 has 0, rank 1 has 1, rank 2 has 2, rank 3 has 3, rank 4 has 4, and 59 more ranks differ");
  EXPECT_LT(message.size(), 500u);
}

TEST(Agreement, NamesAreComparedOnlyWhereAllRanksHaveThem) {
  std::vector<AgreementRecord> records = agreeing(3);
  records[1].names_hash = 0;
  records[2].names_hash = 0x99;
  EXPECT_EQ(describe_disagreement(records), "");
  records[1].names_hash = 0x22;
  expect_contains(describe_disagreement(records),
                  "names of the parameters in the bucket: rank 0 has 0000000000000022, rank 2 has 0000000000000099");
}

TEST(Agreement, BucketNamesServeTheMessageOnly) {
  std::vector<AgreementRecord> records = agreeing(2);
  std::strcpy(records[1].bucket, "something.else");
  EXPECT_EQ(describe_disagreement(records), "");
}

TEST(Agreement, ANameThatFillsItsFieldEndsThere) {
  std::vector<AgreementRecord> records = agreeing(2);
  std::memset(records[0].bucket, 'x', sizeof records[0].bucket); // cut off: no terminating zero
  records[1].step = 8;
  expect_contains(describe_disagreement(records), "'" + std::string(sizeof records[0].bucket, 'x') + "'");
}

TEST(Agreement, ARecordOfAnotherVersionIsReadNoFurther) {
  std::vector<AgreementRecord> records = agreeing(2);
  const uint32_t version = records[0].record_version;
  records[1].record_version = version + 1;
  records[1].step = 1234567;
  const std::string message = describe_disagreement(records);
  expect_contains(message,
                  "version of the agreement record: rank 0 has " + std::to_string(version) + ", rank 1 has " + std::to_string(version + 1));
  EXPECT_EQ(message.find("step:"), std::string::npos) << message;
}

TEST(Agreement, ARecordInTheWrongPlaceIsNamed) {
  std::vector<AgreementRecord> records = agreeing(3);
  records[1].rank = 2;
  EXPECT_EQ(describe_disagreement(records), "the agreement record at position 1 says it comes from rank 2");
}

TEST(Agreement, DensitiesAreShownWithAsManyDigitsAsTellThemApart) {
  std::vector<AgreementRecord> records = agreeing(2);
  records[1].density = std::nextafter(0.01, 1.0);
  expect_contains(describe_disagreement(records), "density: rank 0 has 0.01, rank 1 has 0.010000000000000002");
}

TEST(Agreement, TheMessageIsTheSameOnEveryRank) {
  // All ranks see the same gathered records, so one call stands for all; but it must not depend on what lies beside a name.
  std::vector<AgreementRecord> records = agreeing(2);
  records[1].step = 8;
  const std::string message = describe_disagreement(records);
  std::memset(records[0].bucket + 20, 'z', sizeof records[0].bucket - 20); // behind the terminating zero
  EXPECT_EQ(describe_disagreement(records), message);
}

} // namespace
} // namespace compressed_ddp
