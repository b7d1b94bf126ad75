// The counters that a launch adds to.
#pragma once

#include <string>

#include "counters.h"

namespace simt {

Counters& counters_of(const std::string& kernel); // valid until reset_counters(); creates them

} // namespace simt
