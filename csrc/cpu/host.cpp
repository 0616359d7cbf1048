// Instruction-set choice, and the checks and plans that all CPU ops share. Compiled once, for the default target.
#include "host.h"

#include <cstdlib>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace granvit::cpu {

namespace {

// How far a box may reach beyond its image; farther means another unit. The same as BOX_RANGE in
// granvit/ops/_checks.py.
constexpr double kBoxLow = -1;
constexpr double kBoxHigh = 2;

constexpr const char* kIsaNames[] = {"default", "avx2", "avx512", "avx512bf16"};

bool compiled(IsaLevel level) {
  switch (level) {
    case IsaLevel::kDefault:
      return true;
    case IsaLevel::kAvx2:
#ifdef GRANVIT_HAVE_AVX2
      return true;
#else
      return false;
#endif
    case IsaLevel::kAvx512:
#ifdef GRANVIT_HAVE_AVX512
      return true;
#else
      return false;
#endif
    case IsaLevel::kAvx512Bf16:
#ifdef GRANVIT_HAVE_AVX512BF16
      return true;
#else
      return false;
#endif
  }
  return false;
}

bool supported(IsaLevel level) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  switch (level) {
    case IsaLevel::kDefault:
      return true;
    case IsaLevel::kAvx2:
      return avx2;
    case IsaLevel::kAvx512:
      return avx512;
    case IsaLevel::kAvx512Bf16:
      return avx512 && __builtin_cpu_supports("avx512bf16");
  }
  return false;
#else
  return level == IsaLevel::kDefault;
#endif
}

IsaLevel choose_isa() {
  int level = static_cast<int>(IsaLevel::kAvx512Bf16);
  if (const char* wanted = std::getenv("GRANVIT_CPU_ISA"); wanted != nullptr && *wanted != '\0') {
    level = -1;
    for (int i = 0; i < 4; ++i)
      if (std::string(wanted) == kIsaNames[i]) level = i;
    if (level < 0)
      throw std::runtime_error(std::string("GRANVIT_CPU_ISA: expected default, avx2, avx512 or avx512bf16, got ") +
                               wanted);
    const auto isa = static_cast<IsaLevel>(level);
    if (!compiled(isa) || !supported(isa))
      throw std::runtime_error(std::string("GRANVIT_CPU_ISA: ") + wanted +
                               (compiled(isa) ? " is not supported by this processor" : " was not compiled"));
    return isa;
  }
  while (!compiled(static_cast<IsaLevel>(level)) || !supported(static_cast<IsaLevel>(level))) --level;
  return static_cast<IsaLevel>(level);
}

}  // namespace

IsaLevel isa_level() {
  static const IsaLevel level = choose_isa();
  return level;
}

std::string isa_name(IsaLevel level) { return kIsaNames[static_cast<int>(level)]; }

std::string compiled_isas() {
  std::string names;
  for (int i = 0; i < 4; ++i)
    if (compiled(static_cast<IsaLevel>(i))) names += (names.empty() ? "" : ",") + std::string(kIsaNames[i]);
  return names;
}

HostPlan::HostPlan(const char* op, const RegionArguments& a, int64_t num_images) {
  // Images
  if (a.grid_sizes) {
    const auto sizes = read_integers(*a.grid_sizes, op, "grid_size");
    num_images = static_cast<int64_t>(sizes.size()) / 2;
    images_.reserve(num_images);
    int64_t first = 0;
    for (int64_t b = 0; b < num_images; ++b) {
      const int64_t h = sizes[2 * b], w = sizes[2 * b + 1];
      expect(h >= 1 && w >= 1, op, ": grid_size: expected heights and widths of at least 1, got (", h, ", ", w,
             ") for image ", b);
      images_.push_back({h, w, first});
      first += h * w;
    }
    plan_.num_tokens = first;
  } else {
    expect(a.grid_height >= 1 && a.grid_width >= 1, op, ": grid_size: expected height and width of at least 1, got (",
           a.grid_height, ", ", a.grid_width, ")");
    const int64_t tokens = a.grid_height * a.grid_width;
    images_.reserve(num_images);
    for (int64_t b = 0; b < num_images; ++b) images_.push_back({a.grid_height, a.grid_width, b * tokens});
    plan_.num_tokens = num_images * tokens;
  }

  // Regions
  expect(a.boxes.dim() == 2 && a.boxes.size(1) == 4, op, ": boxes: expected shape (R, 4)");
  expect(a.boxes.is_cpu(), op, ": boxes: expected a tensor on the CPU");
  const int64_t num_regions = a.boxes.size(0);
  const auto image_index = read_integers(a.image_index, op, "image_index");
  expect(a.image_index.dim() == 1 && static_cast<int64_t>(image_index.size()) == num_regions, op,
         ": image_index: expected shape (", num_regions, ",) to match boxes");
  std::vector<int64_t> outs;
  if (a.output_sizes) {
    outs = read_integers(*a.output_sizes, op, "output_size");
    expect(static_cast<int64_t>(outs.size()) == 2 * num_regions, op, ": output_size: expected shape (", num_regions,
           ", 2) to match boxes");
  }
  const bool wide = a.boxes.scalar_type() == ScalarType::Double;
  expect(wide || a.boxes.scalar_type() == ScalarType::Float, op, ": boxes: expected float32");
  const double* boxes64 = wide ? a.boxes.const_data_ptr<double>() : nullptr;
  const float* boxes32 = wide ? nullptr : a.boxes.const_data_ptr<float>();
  const int64_t row = a.boxes.stride(0), column = a.boxes.stride(1);
  regions_.reserve(num_regions);
  image_start_.assign(num_images + 1, 0);
  int64_t first_cell = 0;
  for (int64_t r = 0; r < num_regions; ++r) {
    double edge[4];
    for (int i = 0; i < 4; ++i) {
      const int64_t offset = r * row + i * column;
      edge[i] = wide ? boxes64[offset] : static_cast<double>(boxes32[offset]);
    }
    const bool finite =
        std::isfinite(edge[0]) && std::isfinite(edge[1]) && std::isfinite(edge[2]) && std::isfinite(edge[3]);
    expect(finite && edge[0] <= edge[2] && edge[1] <= edge[3], op,
           ": boxes: expected finite x0 <= x1 and y0 <= y1, got [", edge[0], ", ", edge[1], ", ", edge[2], ", ",
           edge[3], "] in row ", r);
    bool near = true;
    for (const double e : edge) near = near && e >= kBoxLow && e <= kBoxHigh;
    expect(near, op, ": boxes: expected coordinates relative to the image, 0 to 1 (at most ", kBoxLow, " to ", kBoxHigh,
           "), got [", edge[0], ", ", edge[1], ", ", edge[2], ", ", edge[3], "] in row ", r);
    const int64_t image = image_index[r];
    expect(image >= 0 && image < num_images, op, ": image_index: expected values in [0, ", num_images, "), got ", image,
           " in row ", r);
    const int64_t h = a.output_sizes ? outs[2 * r] : a.output_height;
    const int64_t w = a.output_sizes ? outs[2 * r + 1] : a.output_width;
    expect(h >= 1 && w >= 1, op, ": output_size: expected heights and widths of at least 1, got (", h, ", ", w,
           ") for region ", r);
    regions_.push_back({edge[0], edge[1], edge[2], edge[3], image, h, w, first_cell});
    first_cell += h * w;
    ++image_start_[image + 1];
  }
  for (int64_t b = 0; b < num_images; ++b) image_start_[b + 1] += image_start_[b];
  by_image_.resize(num_regions);
  std::vector<int64_t> next(image_start_.begin(), image_start_.end() - 1);
  for (int64_t r = 0; r < num_regions; ++r) by_image_[next[regions_[r].image]++] = r;

  plan_.images = images_.data();
  plan_.num_images = num_images;
  plan_.regions = regions_.data();
  plan_.num_regions = num_regions;
  plan_.num_cells = first_cell;
  plan_.by_image = by_image_.data();
  plan_.image_start = image_start_.data();
}

TokenView view_tokens(const char* op, const char* name, const Tensor& tokens, const RegionPlan& plan, bool packed) {
  const int64_t lead = packed ? 1 : 2;  // dimensions before a token's own
  expect(tokens.is_cpu(), op, ": ", name, ": expected a tensor on the CPU");
  expect(tokens.dim() > lead, op, ": ", name, ": expected at least ", lead + 1, " dimensions, got ", tokens.dim());
  const int64_t count = packed ? tokens.size(0) : tokens.size(0) * tokens.size(1);
  expect(count == plan.num_tokens && (packed || tokens.size(0) == plan.num_images), op, ": ", name, ": expected ",
         plan.num_tokens, " tokens for the grids of grid_size, got ", count);
  int64_t inner = 1;
  for (int64_t d = tokens.dim() - 1; d >= lead; --d) {
    expect(tokens.size(d) <= 1 || tokens.stride(d) == inner, op, ": ", name,
           ": expected contiguous dimensions after the tokens");
    inner *= tokens.size(d);
  }
  // const_data_ptr: reading must not materialise a copy-on-write tensor; outputs are freshly made and never shared.
  void* data = const_cast<void*>(tokens.const_data_ptr());
  return {data, dtype_of(tokens, op, name), tokens.stride(lead - 1), packed ? 0 : tokens.stride(0), packed};
}

void advise_huge_pages([[maybe_unused]] const Tensor& t) {
#if defined(__linux__)
  constexpr uintptr_t kHugePage = 2 << 20;
  const auto data = reinterpret_cast<uintptr_t>(t.const_data_ptr());
  const uintptr_t begin = (data + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (data + static_cast<uintptr_t>(t.numel()) * t.element_size()) / kHugePage * kHugePage;
  // Advice: where the system has no huge pages to give, nothing changes.
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace granvit::cpu
