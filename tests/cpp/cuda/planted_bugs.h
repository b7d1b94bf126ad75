#pragma once

#include <cstdint>

namespace compressed_ddp::testing {

enum class PlantedBug {
  kNone,
  kNoBarrier, // between the warps' sums and who adds them
  kNoFenceBeforeTicket,
  kNoFenceAfterTicket,
  kNoSyncWarp,
  kWrongMask, // a lane takes part that the mask leaves out
  kSlotOverflow,
  kLookBackByBlockIndex, // which blocks run is not a matter of their index
  kLostTie,
};

void run_sum(const uint32_t* values, int numel, uint32_t* partial, uint32_t* ticket, uint32_t* sum, int blocks, PlantedBug bug);
void run_rotate(uint32_t* values, PlantedBug bug);
void run_slots(const uint32_t* values, uint32_t low, uint32_t* slots, uint32_t* counts, int capacity, int blocks, PlantedBug bug);
void run_chain(uint32_t* ticket, uint32_t* published, int blocks, PlantedBug bug);
void run_ties(const uint32_t* values, uint32_t threshold, uint32_t ties, uint32_t* out, PlantedBug bug);

} // namespace compressed_ddp::testing
