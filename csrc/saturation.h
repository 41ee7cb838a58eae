// How a step knows that it need not read w.
//
// Note [Saturated chunks]
// Once w is 1 it stays 1, so a chunk of kStepChunk elements in which all are need neither be read nor written. Whether
// it is so is noted beside the state, in a stamp for each chunk. What it says must not outlive the w that it is about,
// which others may replace: a checkpoint is loaded, a captured graph's state is written in place, memory is used again.
// So a stamp is good for a single step, which it names and which renews it: whoever puts another w there puts another
// count of steps beside it. Who changes w alone is known by torch's counters of versions (maxva_kernels/saturation.py).
// On a GPU chunks are cut a little early in tensors that begin within a packet, by a shift that the gradient's address
// has a part in; a stamp names that too. And there, whether all are 1 is not followed through the update, which has no
// register to spare for it: in one of kSearches steps a chunk without a stamp is read again.
#pragma once

#include "maxva.h"

namespace maxva {

// In step number `step` all w of the chunk are 1 before it. 0, which one step in 2^29 has, stands for not known.
MAXVA_FN uint32_t saturation_stamp(int64_t step, int shift) {
  return static_cast<uint32_t>(step) * 8 + static_cast<uint32_t>(shift);
}

MAXVA_FN bool is_stamped(uint32_t stamp, int64_t step, int shift) {
  return stamp != 0 && stamp == saturation_stamp(step, shift);
}

// A GPU looks for chunks that have become saturated in one of so many steps.
constexpr int kSearches = 16;

}  // namespace maxva
