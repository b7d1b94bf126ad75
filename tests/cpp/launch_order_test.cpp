#include "launch_order.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

namespace compressed_ddp {
namespace {

// Notes what begins ("b3"), what is refused ("x3"), and what is done after that ("t3").
LaunchOrder::Begin noted(std::vector<std::string>& notes, int ticket, bool can_begin = true) {
  return [&notes, ticket, can_begin](bool is_lost) -> LaunchOrder::Begun {
    const bool begins = can_begin && !is_lost;
    const auto note = [&notes, ticket](char what) { notes.emplace_back(1, what).append(std::to_string(ticket)); };
    note(begins ? 'b' : 'x');
    return {begins, [note] { note('t'); }};
  };
}

using Notes = std::vector<std::string>;

TEST(LaunchOrder, CollectivesBeginInTheOrderOfTheirTickets) {
  LaunchOrder order;
  Notes notes;
  for (int ticket = 0; ticket < 4; ++ticket) EXPECT_EQ(order.take_ticket(), ticket);
  order.launch(2, noted(notes, 2));
  order.launch(1, noted(notes, 1));
  EXPECT_EQ(notes, Notes{});
  order.launch(0, noted(notes, 0));
  EXPECT_EQ(notes, (Notes{"b0", "b1", "b2", "t0", "t1", "t2"}));
  order.launch(3, noted(notes, 3));
  EXPECT_EQ(notes.back(), "t3");
}

TEST(LaunchOrder, NothingBeginsBehindACollectiveThatCouldNot) {
  LaunchOrder order;
  Notes notes;
  for (int ticket = 0; ticket < 3; ++ticket) order.take_ticket();
  order.launch(1, noted(notes, 1));
  order.launch(0, noted(notes, 0, false));
  EXPECT_EQ(notes, (Notes{"x0", "x1", "t0", "t1"}));
  order.launch(2, noted(notes, 2));
  EXPECT_EQ(notes.back(), "t2");
  EXPECT_EQ(notes[4], "x2");
}

TEST(LaunchOrder, ALostOrderRefusesThoseThatWaitAtOnce) {
  LaunchOrder order;
  Notes notes;
  for (int ticket = 0; ticket < 3; ++ticket) order.take_ticket();
  order.launch(1, noted(notes, 1));
  order.lose(); // ticket 0 never comes
  EXPECT_EQ(notes, (Notes{"x1", "t1"}));
  order.launch(2, noted(notes, 2));
  EXPECT_EQ(notes.back(), "t2");
}

TEST(LaunchOrder, RefusalsOfSeveralBucketsAreDoneOnceEachInTheirOrder) {
  LaunchOrder order;
  Notes notes;
  for (int ticket = 0; ticket < 6; ++ticket) order.take_ticket();
  order.launch(4, noted(notes, 4));
  order.launch(2, noted(notes, 2, false));
  order.launch(1, noted(notes, 1, false));
  EXPECT_EQ(notes, Notes{}) << "nobody's turn has come";
  order.launch(0, noted(notes, 0));
  EXPECT_EQ(notes, (Notes{"b0", "x1", "x2", "x4", "t0", "t1", "t2", "t4"}));
  order.lose(); // ticket 3 never comes; the order is lost already
  EXPECT_EQ(notes.size(), 8u);
  order.launch(5, noted(notes, 5, false));
  EXPECT_EQ(Notes(notes.begin() + 8, notes.end()), (Notes{"x5", "t5"}));
}

TEST(LaunchOrder, ABucketThatIsRefusedMayLoseTheOrderOnceMore) {
  LaunchOrder order;
  Notes notes;
  for (int ticket = 0; ticket < 3; ++ticket) order.take_ticket();
  // As a run gives up: what it had still to begin is lost, in the same order of another collective or in this one.
  order.launch(1, [&](bool is_lost) -> LaunchOrder::Begun {
    notes.push_back(is_lost ? "x1" : "b1");
    return {false, [&] {
              notes.push_back("t1");
              order.lose();
            }};
  });
  order.launch(2, noted(notes, 2));
  order.launch(0, noted(notes, 0, false));
  EXPECT_EQ(notes, (Notes{"x0", "x1", "x2", "t0", "t1", "t2"}));
}

// What is done when a collective has begun may launch others.
TEST(LaunchOrder, IsNotLockedWhileWhatFollowsRuns) {
  LaunchOrder order;
  int begun = 0;
  const int64_t first = order.take_ticket(), second = order.take_ticket();
  order.launch(first, [&](bool) -> LaunchOrder::Begun {
    return {true, [&] { order.launch(second, [&](bool) -> LaunchOrder::Begun { return {true, [&] { ++begun; }}; }); }};
  });
  EXPECT_EQ(begun, 1);
}

} // namespace
} // namespace compressed_ddp
