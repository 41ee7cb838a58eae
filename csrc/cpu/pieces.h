// Work that threads take piece by piece.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#include "cpu/ieee_mode.h"

namespace maxva::cpu {

// Elements that a thread takes at a time, and then the next: a core may run at four fifths of another's pace, where
// others use it too, and with equal shares fixed beforehand all would wait for it. Of few elements a quarter of
// a share.
constexpr int64_t kLeastPiece = 8192, kPiece = 65536;

// Calls work(begin, end) for pieces of a row of `total` elements, side by side. `grain` is the number of elements below
// which a thread is not worth waking.
template <typename Work>
void for_pieces(int64_t total, int64_t grain, const Work& work) {
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, total, grain, [&](int64_t first, int64_t last) {
    const IeeeMode mode;
    const int64_t piece = std::clamp((last - first) / 4, kLeastPiece, kPiece);
    for (int64_t begin; (begin = next.fetch_add(piece, std::memory_order_relaxed)) < total;) {
      work(begin, std::min(begin + piece, total));
    }
  });
}

// Calls work(i) for every chunk of a row, side by side. chunks[i].place is that of the chunk's first element.
template <typename Chunk, typename Work>
void for_chunks(const std::vector<Chunk>& chunks, int64_t total, int64_t grain, const Work& work) {
  const auto first_from = [&](int64_t place) {
    const auto before = [](const Chunk& chunk, int64_t at) { return chunk.place < at; };
    return std::lower_bound(chunks.begin(), chunks.end(), place, before) - chunks.begin();
  };
  for_pieces(total, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = first_from(begin), stop = first_from(end); i < stop; ++i) {
      work(i);
    }
  });
}

}  // namespace maxva::cpu
