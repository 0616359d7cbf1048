// Packing of variable-length sequences into bins of one capacity, for batches of crops and of question-answer pairs.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace granvit {

// Best fit, longest first: each sequence goes to the fullest bin that still holds it, the earliest of equals. At most
// 11/9 of the fewest possible bins, plus one (Johnson et al. 1974). O(n log n). Returns the bin of every sequence.
inline std::vector<int64_t> pack_sequences(const std::vector<int64_t>& lengths, int64_t capacity) {
  if (capacity < 1) throw std::invalid_argument("pack: capacity: expected at least 1, got " + std::to_string(capacity));
  for (size_t i = 0; i < lengths.size(); ++i)
    if (lengths[i] < 0 || lengths[i] > capacity)
      throw std::invalid_argument("pack: lengths: expected 0 to the capacity " + std::to_string(capacity) + ", got " +
                                  std::to_string(lengths[i]) + " at position " + std::to_string(i));
  std::vector<size_t> order(lengths.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return lengths[a] > lengths[b]; });
  std::set<std::pair<int64_t, int64_t>> room;  // (free space, bin)
  std::vector<int64_t> bin(lengths.size());
  int64_t bins = 0;
  for (const size_t i : order) {
    const auto fit = room.lower_bound({lengths[i], -1});
    int64_t free = capacity;
    if (fit == room.end()) {
      bin[i] = bins++;
    } else {
      free = fit->first;
      bin[i] = fit->second;
      room.erase(fit);
    }
    room.insert({free - lengths[i], bin[i]});
  }
  return bin;
}

}  // namespace granvit
