// A float32 master weight kept as a bfloat16 parameter and 16 bits beside it.
//
// Note [Master weights]
// The parameter is the master rounded to nearest, and `rest` is what, added to its bits as an integer, gives the
// master's: nothing is lost, and there are 2 bytes where a copy in float32 has 4. That the difference fits 16 bits with
// their sign, ties are rounded away from zero. A parameter that something else wrote since is a master with a small
// rest, and no old copy overwrites it. A rest that would make a NaN of it (below 0 beside a zero, above beside an
// infinity) is no part of any master, and counts as 0.
// In torch the rest lies in a bfloat16 tensor, for the sake of collectives, which move no int16, and of tools that cast
// state to its parameter's dtype: it is 16 bits and not a number.
#pragma once

#include "float16.h"

namespace maxva {

MAXVA_FN float join_master(BFloat16 param, int16_t rest) {
  const uint32_t bits = uint32_t(param.bits) << 16;
  const float master = from_bits(bits + static_cast<uint32_t>(int32_t(rest)));
  return master == master ? master : from_bits(bits);
}

// A NaN becomes one of no rest; may_be_nan says whether to look.
MAXVA_FN void split_master(float master, BFloat16& param, int16_t& rest, bool may_be_nan = true) {
  const uint32_t bits = to_bits(master);
  const bool is_nan = may_be_nan && master != master;
  param.bits = static_cast<uint16_t>(is_nan ? 0x7fc0u : (bits + 0x8000u) >> 16);
  rest = static_cast<int16_t>(is_nan ? 0u : bits & 0xffffu);
}

}  // namespace maxva
