// Instructions in which the lanes of a warp work together.
#include <bit>

#include "decoder.h"

namespace simt::ptx {
namespace {

// ---- vote

enum Vote : size_t { kAllVote, kAnyVote, kUniform, kBallotOfAll };

// from: predicate, mask
template <Vote vote>
void execute_vote(PtxThread& thread, const Instruction& i) {
  const auto mask = thread.read<uint32_t>(i.from[1]);
  const bool voted = thread.predicate(i.from[0]) != i.negated_predicate;
  const auto ballot = static_cast<uint32_t>(collective(Collective::kBallot, mask, voted, 0, i.at));
  if constexpr (vote == kBallotOfAll)
    thread.write(i.to[0], ballot);
  else
    thread.write(i.to[0], vote == kAllVote ? ballot == mask : vote == kAnyVote ? ballot != 0 : ballot == mask || ballot == 0);
}

Execute decode_vote(Decoder& d) {
  d.require("sync");
  const size_t vote = d.require_one_of({"all", "any", "uni", "ballot"});
  d.destination(d.take_type({vote == kBallotOfAll ? Type::kB32 : Type::kPredicate}));
  d.predicate_source();
  d.source(Type::kB32);
  constexpr Execute kVotes[] = {execute_vote<kAllVote>, execute_vote<kAnyVote>, execute_vote<kUniform>, execute_vote<kBallotOfAll>};
  return kVotes[vote];
}

// ---- shuffle: c holds the segment mask in bits 8 to 12 and the clamp in bits 0 to 4

enum Shuffle : size_t { kUp, kDown, kButterfly, kIndex };

// from: value, distance or lane, c, mask
template <Shuffle shuffle>
void execute_shuffle(PtxThread& thread, const Instruction& i) {
  const uint32_t lane = thread.thread->lane, b = thread.read<uint32_t>(i.from[1]) & 31, c = thread.read<uint32_t>(i.from[2]);
  const uint32_t segment = c >> 8 & 31, clamp = c & 31;
  const uint32_t last = (lane & segment) | (clamp & ~segment), first = lane & segment;
  uint32_t source = 0;
  bool in_range = false;
  switch (shuffle) {
    case kUp: // `last` is then the lowest lane
      source = lane - b;
      in_range = static_cast<int32_t>(source) >= static_cast<int32_t>(last);
      break;
    case kDown:
      source = lane + b;
      in_range = source <= last;
      break;
    case kButterfly:
      source = lane ^ b;
      in_range = source <= last;
      break;
    case kIndex:
      source = first | (b & ~segment);
      in_range = source <= last;
      break;
  }
  const auto mask = thread.read<uint32_t>(i.from[3]);
  const uint64_t value = collective(Collective::kShuffle, mask, thread.read<uint32_t>(i.from[0]), in_range ? source : lane, i.at);
  thread.write(i.to[0], static_cast<uint32_t>(value));
  thread.write(i.to[1], in_range);
}

Execute decode_shuffle(Decoder& d) {
  d.require("sync");
  const size_t shuffle = d.require_one_of({"up", "down", "bfly", "idx"});
  d.require("b32");
  d.optional_predicate_destination(Type::kB32);
  for (int n = 0; n < 4; ++n) d.source(Type::kB32);
  constexpr Execute kShuffles[] = {execute_shuffle<kUp>, execute_shuffle<kDown>, execute_shuffle<kButterfly>, execute_shuffle<kIndex>};
  return kShuffles[shuffle];
}

// ---- reductions

void execute_redux(PtxThread& thread, const Instruction& i) { // from: value, mask
  const auto kind = static_cast<Collective>(i.mode);
  const uint64_t result = collective(kind, thread.read<uint32_t>(i.from[1]), thread.read<uint32_t>(i.from[0]), 0, i.at);
  thread.write(i.to[0], static_cast<uint32_t>(result));
}

Execute decode_redux(Decoder& d) {
  d.require("sync");
  const size_t operation = d.require_one_of({"add", "min", "max", "and", "or", "xor"});
  const Type type = operation < 3 ? d.take_type({Type::kU32, Type::kS32}) : d.take_type({Type::kB32});
  d.operands(Type::kB32, 2);
  constexpr Collective kUnsigned[] = {Collective::kReduceAdd, Collective::kReduceMin, Collective::kReduceMax,
                                      Collective::kReduceAnd, Collective::kReduceOr,  Collective::kReduceXor};
  constexpr Collective kSigned[] = {Collective::kReduceAdd, Collective::kReduceMinSigned, Collective::kReduceMaxSigned};
  d.result.mode = static_cast<uint8_t>(type == Type::kS32 ? kSigned[operation] : kUnsigned[operation]);
  return execute_redux;
}

// ---- match

template <typename T, bool all>
void execute_match(PtxThread& thread, const Instruction& i) { // from: value, mask
  const auto mask = thread.read<uint32_t>(i.from[1]);
  const auto equal = static_cast<uint32_t>(collective(Collective::kMatchAny, mask, thread.read<T>(i.from[0]), 0, i.at));
  thread.write(i.to[0], all && equal != mask ? 0 : equal);
  if constexpr (all) thread.write(i.to[1], equal == mask);
}

Execute decode_match(Decoder& d) {
  d.require("sync");
  const bool all = d.require_one_of({"any", "all"}) == 1;
  const Type type = d.take_type(kBits32To64);
  if (all)
    d.optional_predicate_destination(Type::kB32);
  else
    d.destination(Type::kB32);
  d.source(type);
  d.source(Type::kB32);
  if (type == Type::kB32) return all ? execute_match<uint32_t, true> : execute_match<uint32_t, false>;
  return all ? execute_match<uint64_t, true> : execute_match<uint64_t, false>;
}

// ---- who is here

// Any set of lanes that holds the asking one may be active together: the smallest is right and finds code that hopes for more.
void execute_activemask(PtxThread& thread, const Instruction& i) { thread.write(i.to[0], 1u << thread.thread->lane); }

Execute decode_activemask(Decoder& d) {
  d.require("b32");
  d.destination(Type::kB32);
  return execute_activemask;
}

void execute_elect(PtxThread& thread, const Instruction& i) { // the lowest lane of the mask
  const auto mask = thread.read<uint32_t>(i.from[0]);
  collective(Collective::kBallot, mask, 0, 0, i.at);
  const auto leader = static_cast<uint32_t>(std::countr_zero(mask));
  thread.write(i.to[0], leader);
  thread.write(i.to[1], leader == thread.thread->lane);
}

Execute decode_elect(Decoder& d) {
  d.require("sync");
  d.optional_predicate_destination(Type::kB32);
  d.source(Type::kB32);
  return execute_elect;
}

constexpr Opcode kOpcodes[] = {
    {"vote", decode_vote},   {"shfl", decode_shuffle},          {"redux", decode_redux},
    {"match", decode_match}, {"activemask", decode_activemask}, {"elect", decode_elect},
};

} // namespace

std::span<const Opcode> warp_opcodes() { return kOpcodes; }

} // namespace simt::ptx
