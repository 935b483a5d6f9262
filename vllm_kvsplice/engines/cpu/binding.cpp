// From Python and torch to the kernels: checks, tables made once a layer, and the choice of instruction set.
#include <torch/extension.h>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <cmath>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "numbers.h"

namespace kvsplice {
namespace {

using at::Tensor;
using Widths = std::vector<std::vector<int64_t>>;

// Vectors that no load of 64 bytes finds across two lines.
template <class T>
struct Aligned {
    using value_type = T;
    Aligned() = default;
    template <class U>
    Aligned(const Aligned<U>&) {}
    T* allocate(size_t count) { return static_cast<T*>(kvsplice::allocate(count * sizeof(T))); }
    void deallocate(T* memory, size_t) { release(memory); }
    bool operator==(const Aligned&) const { return true; }
};
template <class T>
using Numbers = std::vector<T, Aligned<T>>;
using Table = Numbers<float>;

// Tables of one rotation; they grow, and all layers that turn alike share them.
struct RotaryTables {
    std::vector<float> inv_freq;
    Table angles, centres, coefficients, in_order, in_quads, segment_centres, slow;
    Numbers<int8_t> high, low;
    Rotary view{};

    RotaryTables(std::vector<float> frequencies, bool interleaved) : inv_freq(std::move(frequencies)) {
        const int pairs = static_cast<int>(inv_freq.size());
        // Frequencies fall from pair to pair; where they do not, some slow ones count as faster.
        for (int n = 0; n <= kTerms; ++n)
            for (int f = 0; f < pairs; ++f)
                if (n == 0 || neglected(kTile / 2 * std::abs(inv_freq[f]), 2 * n) > kSlack) view.slow[n] = f + 1;
        for (int f = view.fast(); f < pairs; ++f)
            for (int degree = 0; degree < 2 * kTerms; ++degree)
                coefficients.insert(coefficients.end(), kSplitTiles, chebyshev(kTile / 2 * inv_freq[f], degree));
        for (int s = 0; s < 32; ++s) {
            // Second half of a tile; quads: register 2 or 3, whose lanes hold four tokens of each quarter.
            const int quad_token = s / 4 % 4 * 16 + (2 + s / 16) * 4 + s % 4;
            add_offset(in_order, s, 32 + s - (kTile - 1) / 2.0);
            add_offset(in_quads, s, quad_token - (kTile - 1) / 2.0);
        }
        make_series();
        view.coefficients = coefficients.data();
        view.offsets_in_order = in_order.data();
        view.offsets_in_quads = in_quads.data();
        view.pairs = pairs;
        view.interleaved = interleaved;
    }

    void add_offset(Table& table, int place, double offset) {
        const int fast = view.fast();
        table.resize((fast + kTerms) * 64);
        for (int f = 0; f < fast; ++f) {
            table[f * 64 + place] = static_cast<float>(std::cos(offset * inv_freq[f]));
            table[f * 64 + 32 + place] = static_cast<float>(std::sin(offset * inv_freq[f]));
        }
        for (int degree = 0; degree < 2 * kTerms; ++degree)
            table[(fast + degree / 2) * 64 + degree % 2 * 32 + place] =
                static_cast<float>(std::cos(degree * std::acos(offset / (kTile / 2))));
    }

    // About what cos(a x) and sin(a x) have of Chebyshev polynomials from this degree on: 2 J_degree(a).
    static double neglected(double a, int degree) { return 2 * std::pow(a / 2, degree) / std::tgamma(degree + 1); }

    // Of cos(a x), or of sin(a x) where `degree` is odd: its coefficient of the Chebyshev polynomial of that degree.
    static float chebyshev(double a, int degree) {
        constexpr int kPoints = 32;
        double sum = 0;
        for (int i = 0; i < kPoints; ++i) {
            const double angle = M_PI * (i + 0.5) / kPoints, x = a * std::cos(angle);
            sum += (degree % 2 ? std::sin(x) : std::cos(x)) * std::cos(degree * angle);
        }
        return static_cast<float>(sum * (degree ? 2 : 1) / kPoints);
    }

    void make_series() {
        const int pairs = static_cast<int>(inv_freq.size());
        const double centre = (kSegment - 1) / 2.0, half = kSegment / 2.0;
        Series& series = view.series;
        for (int f = 0; f < pairs; ++f) {
            if (std::abs(inv_freq[f]) * half >= kSlow) series.fast = f + 1;
            if (std::abs(inv_freq[f]) * half >= kSlower) series.slower = f + 1;
        }
        series.used = 2 * series.fast + (series.fast < pairs ? kDegree : 0);
        series.columns = (series.used + 63) / 64 * 64;
        for (int f = series.fast; f < pairs; ++f) {
            // Constants that are larger than all else would not fit 32 bits.
            float largest = 1 / 64.0f;
            for (int degree = 0; degree <= kDegree; ++degree) {
                slow.push_back(chebyshev(half * inv_freq[f], degree));
                if (degree) largest = std::max(largest, std::abs(slow.back()));
            }
            slow.push_back(largest);
        }
        high.resize(kSegment * series.columns);
        low.resize(high.size());
        for (int s = 0; s < kSegment; ++s)
            for (int column = 0; column < series.used; ++column) {
                const double offset = s - centre, angle = column < 2 * series.fast ? offset * inv_freq[column / 2] : 0,
                             exact = column >= 2 * series.fast
                                         ? std::cos((column - 2 * series.fast + 1) * std::acos(offset / half))
                                     : column % 2 ? std::sin(angle)
                                                  : std::cos(angle);
                const int whole = static_cast<int>(std::lround(exact * kWhole));
                const size_t at = s * series.columns + column;
                low[at] = static_cast<int8_t>(whole);
                high[at] = static_cast<int8_t>((whole - low[at]) >> 8);
            }
        series.slow = slow.data();
        series.high = high.data();
        series.low = low.data();
    }

    void reach_position(int64_t position) {
        const int64_t pairs = view.pairs, known = angles.size() / (2 * pairs);
        if (position >= known) angles.resize((position + 1024) / 1024 * 1024 * 2 * pairs);
        for (int64_t i = known; i < static_cast<int64_t>(angles.size()) / (2 * pairs); ++i)
            for (int64_t f = 0; f < pairs; ++f) {
                const double angle = i * static_cast<double>(inv_freq[f]);
                angles[i * 2 * pairs + f] = static_cast<float>(std::cos(angle));
                angles[i * 2 * pairs + pairs + f] = static_cast<float>(std::sin(angle));
            }
        view.angles = angles.data();
    }

    void reach_context(int64_t tokens) {
        const int64_t row = 4 * view.pairs * kSplitTiles, known = centres.size() / row;
        if (tokens > known * kSplit) centres.resize((tokens / kSplit + 1) * row);
        for (int64_t i = known; i < static_cast<int64_t>(centres.size()) / row; ++i)
            for (int f = 0; f < view.pairs; ++f)
                for (int tile = 0; tile < kSplitTiles; ++tile) {
                    const double angle = ((i * kSplitTiles + tile) * kTile + (kTile - 1) / 2.0) * inv_freq[f];
                    const float cosine = static_cast<float>(std::cos(angle)),
                                sine = static_cast<float>(std::sin(angle));
                    float* at = &centres[i * row + f * 4 * kSplitTiles + tile];
                    at[0] = at[3 * kSplitTiles] = cosine;
                    at[kSplitTiles] = -sine;
                    at[2 * kSplitTiles] = sine;
                }
        view.centres = centres.data();
        const int64_t segments = known * kSplit / kSegment;
        segment_centres.resize(centres.size() / row * (kSplit / kSegment) * 2 * view.pairs);
        for (int64_t i = segments; i * 2 * view.pairs < static_cast<int64_t>(segment_centres.size()); ++i)
            for (int f = 0; f < view.pairs; ++f) {
                const double angle = (i * kSegment + (kSegment - 1) / 2.0) * inv_freq[f];
                segment_centres[(i * view.pairs + f) * 2] = static_cast<float>(std::cos(angle));
                segment_centres[(i * view.pairs + f) * 2 + 1] = static_cast<float>(std::sin(angle));
            }
        view.series.centres = segment_centres.data();
    }
};

std::shared_ptr<RotaryTables> shared_rotary(const Tensor& inv_freq, bool interleaved) {
    static std::map<std::pair<std::vector<float>, bool>, std::weak_ptr<RotaryTables>> known;
    const float* data = inv_freq.const_data_ptr<float>();
    std::vector<float> frequencies(data, data + inv_freq.numel());
    auto& entry = known[{frequencies, interleaved}];
    auto tables = entry.lock();
    if (!tables) entry = tables = std::make_shared<RotaryTables>(frequencies, interleaved);
    return tables;
}

Group make_group(int width, int64_t plane, const float* levels) {
    Group group{width, plane, {}, {}, {}};
    const int count = 1 << width;
    for (int code = 0; code < 128; ++code) {
        group.levels[code] = static_cast<int8_t>(levels[code % count]);
        group.raised[code] = static_cast<uint8_t>(group.levels[code] + 128);
    }
    for (int place = -256; place < 256; ++place) {
        int code = 0;
        while (code + 1 < count && levels[code] + levels[code + 1] < static_cast<float>(place)) ++code;
        group.codes[place + 256] = static_cast<uint8_t>(code);
    }
    return group;
}

// A layer's codec in the kernels' form.
class Codec {
  public:
    Codec(const std::map<std::string, Tensor>& key, const std::map<std::string, Tensor>& value,
          const Widths& key_widths, const Widths& value_widths, const Widths& key_planes, const Widths& value_planes,
          const std::optional<Tensor>& inv_freq, bool interleaved, int64_t code_bytes)
        : dim_(key.at("mean").size(1)),
          matrices_(4 * key.at("mean").size(0) * dim_ * dim_),
          keys_(make_halves(key, key_widths, key_planes, false)),
          values_(make_halves(value, value_widths, value_planes, true)) {
        if (inv_freq && inv_freq->numel()) rotary = shared_rotary(inv_freq->contiguous(), interleaved);
        layer = {static_cast<int>(keys_.size()),  static_cast<int>(dim_), code_bytes, keys_.data(), values_.data(),
                 rotary ? &rotary->view : nullptr};
        TORCH_CHECK(layer.dim <= kMaxDim && layer.dim % 8 == 0, "heads of ", layer.dim,
                    " dimensions are not supported");
    }

    Layer layer;
    std::shared_ptr<RotaryTables> rotary;

  private:
    const float* keep(Tensor tensor) {
        kept_.push_back(tensor.to(at::kFloat).contiguous().clone());
        return kept_.back().const_data_ptr<float>();
    }

    // Columns of kColumns, one after the other; matrices lie in the order of their use, which `place` counts.
    const float* keep_matrix(const Tensor& matrix, int64_t place) {
        float* at = matrices_.data() + place * dim_ * dim_;
        float* out = at;
        for (const Tensor& columns : matrix.to(at::kFloat).split(kColumns, 1)) {
            const Tensor whole = columns.contiguous();
            out = std::copy_n(whole.const_data_ptr<float>(), whole.numel(), out);
        }
        return at;
    }

    void keep_parts(const Tensor& matrix, Half& half) {
        const Tensor whole =
            at::constant_pad_nd(matrix.to(at::kFloat), {0, up_to(32, matrix.size(1)), 0, up_to(64, matrix.size(0))});
        const Tensor high = whole.to(at::kBFloat16), low = (whole - high).to(at::kBFloat16);
        kept_.push_back(at::stack({high, low}).contiguous());
        half.parts = static_cast<const uint16_t*>(kept_.back().const_data_ptr());
        half.depth = whole.size(1);
        half.part = whole.numel();
    }

    static int64_t up_to(int64_t multiple, int64_t n) { return (multiple - n % multiple) % multiple; }

    // A sum of D products in float32 is off by at most D 2^-24 (1 + little) times the sum of their sizes (Higham, Accuracy and
    // Stability of Numerical Algorithms, section 3.1), which is no more than the product of both norms. Eight more for what
    // comes after it: doubling, division, slack, and the reference's own rounding.
    static Tensor doubt_of(const Tensor& analysis) {
        return analysis.to(at::kDouble).norm(2, 1) * (2 * (analysis.size(1) + 8) * 1.001 * 0x1p-24);
    }

    std::vector<Half> make_halves(const std::map<std::string, Tensor>& kind, const Widths& widths, const Widths& planes,
                                  bool value) {
        std::vector<Half> halves;
        for (size_t head = 0; head < widths.size(); ++head) {
            const Tensor levels = kind.at("levels")[head].to(at::kFloat).contiguous();
            std::vector<int64_t> latents;
            auto groups = std::make_unique<std::vector<Group>>();
            for (size_t g = 0; g < widths[head].size(); ++g) {
                if (widths[head][g] == 0) continue;
                groups->push_back(make_group(widths[head][g], planes[head][g], levels[g].const_data_ptr<float>()));
                for (int i = 0; i < 8; ++i) latents.push_back(8 * g + i);
            }
            const Tensor used = at::tensor(latents, at::kLong);
            const Tensor synthesis = kind.at("synthesis")[head].index_select(1, used),
                         analysis = kind.at("analysis")[head].index_select(0, used);
            halves.push_back({groups->data(), static_cast<int>(groups->size()), static_cast<int>(latents.size()),
                              keep(kind.at("mean")[head]), keep(kind.at("sink")[head]),
                              keep(kind.at("sink_scale")[head].index_select(0, used)),
                              keep_matrix(analysis.t(), 2 * head + value), keep(doubt_of(analysis)),
                              keep_matrix(value ? synthesis.t() : synthesis, 2 * (widths.size() + head) + value),
                              nullptr, 0, 0});
            keep_parts(value ? synthesis : synthesis.t(), halves.back());
            groups_.push_back(std::move(groups));
        }
        return halves;
    }

    int64_t dim_;
    Table matrices_;
    std::vector<Tensor> kept_;
    std::vector<std::unique_ptr<std::vector<Group>>> groups_;
    std::vector<Half> keys_, values_;
};

// Linux hands out the tile registers to processes that ask; threads inherit the permission.
bool amx_usable() {
#if defined(__x86_64__) && defined(__linux__)
    constexpr unsigned kBfloat16 = 1 << 22, kTile = 1 << 24, kInt8 = 1 << 25, kAll = kBfloat16 | kTile | kInt8;
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kAll) != kAll) return false;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
}

const std::vector<const Kernels*>& available() {
    static const std::vector<const Kernels*> kernels = [] {
        std::vector<const Kernels*> found{&kPortable};
#if defined(__x86_64__)
        __builtin_cpu_init();
        const bool avx2 =
            __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
        const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                            __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni");
        if (avx2) found.insert(found.begin(), &kAvx2);
        if (avx2 && avx512) found.insert(found.begin(), &kAvx512);
        if (avx2 && avx512 && amx_usable()) found.insert(found.begin(), &kAmx);
#endif
        return found;
    }();
    return kernels;
}

std::vector<std::string> instruction_sets() {
    std::vector<std::string> names;
    for (const Kernels* kernels : available()) names.push_back(kernels->name);
    return names;
}

Dtype dtype_of(const Tensor& tensor) {
    switch (tensor.scalar_type()) {
        case at::kFloat:
            return Dtype::kFloat32;
        case at::kBFloat16:
            return Dtype::kBfloat16;
        case at::kHalf:
            return Dtype::kFloat16;
        default:
            TORCH_CHECK(false, "dtype ", tensor.scalar_type(), " is not supported");
    }
}

Tokens tokens_of(const Tensor& x) {
    TORCH_CHECK(x.dim() == 3 && x.stride(2) == 1, "tokens must be [T, H, D] with contiguous rows");
    return {x.const_data_ptr(), dtype_of(x), x.stride(0), x.stride(1)};
}

Pages pages_of(const Tensor& pages) {
    TORCH_CHECK(pages.dim() == 3 && pages.scalar_type() == at::kByte, "pages must be uint8 [B, C, N]");
    TORCH_CHECK(pages.is_cpu(), "pages are on ", pages.device(), ", this engine works on the CPU");
    TORCH_CHECK(pages.stride(1) == pages.size(2) && pages.stride(2) == 1, "a page must be contiguous");
    TORCH_CHECK(pages.size(2) % 16 == 0, "blocks of ", pages.size(2), " tokens; they must hold a multiple of 16");
    return {static_cast<uint8_t*>(pages.data_ptr()), pages.stride(0), static_cast<int>(pages.size(2)), pages.size(1)};
}

const int32_t* indices_of(const Tensor& x) {
    TORCH_CHECK(x.scalar_type() == at::kInt && (x.stride(-1) == 1 || x.size(-1) == 1),
                "indices must be contiguous int32");
    return x.const_data_ptr<int32_t>();
}

void write(const Codec& codec, int isa, const Tensor& key, const Tensor& value, const Tensor& positions,
           const Tensor& slots, const Tensor& pages) {
    TORCH_CHECK(positions.is_contiguous() && slots.is_contiguous(), "positions and slots must be contiguous");
    Writing writing{&codec.layer,
                    tokens_of(key),
                    tokens_of(value),
                    positions.const_data_ptr<int64_t>(),
                    slots.const_data_ptr<int64_t>(),
                    slots.numel(),
                    pages_of(pages),
                    at::get_num_threads()};
    int64_t last = 0;
    for (int64_t t = 0; t < writing.tokens; ++t) last = std::max(last, writing.positions[t]);
    if (codec.rotary) codec.rotary->reach_position(last);
    available().at(isa)->write(writing);
}

// A token's key before its value, converted where the window's dtype is another one.
void write_window(const Tensor& key, const Tensor& value, const Tensor& slots, const Tensor& pages) {
    const Tokens sources[] = {tokens_of(key), tokens_of(value)};
    const int64_t heads = key.size(1), dim = key.size(2), block = pages.size(2);
    TORCH_CHECK(slots.is_contiguous() && dim <= kMaxDim, "slots must be contiguous and heads of at most ", kMaxDim);
    TORCH_CHECK(pages.stride(3) == 1 && pages.stride(2) == 2 * dim, "a window's tokens must be contiguous");
    const Dtype dtype = dtype_of(pages);
    for (int64_t t = 0; t < slots.numel(); ++t) {
        const int64_t slot = slots.const_data_ptr<int64_t>()[t];
        if (slot < 0) continue;
        for (int64_t h = 0; h < heads; ++h)
            for (int kind = 0; kind < 2; ++kind) {
                const Tokens& source = sources[kind];
                copy_row(source.data, source.dtype, t * source.token_stride + h * source.head_stride, dim,
                         pages.data_ptr(), dtype,
                         slot / block * pages.stride(0) + h * pages.stride(1) + (slot % block * 2 + kind) * dim);
            }
    }
}

void attend(const Codec& codec, int isa, const Tensor& query, const Tensor& pages, const Tensor& query_start,
            const Tensor& seq_lens, const Tensor& block_table, double scale, int64_t window_size, bool whole_chunk,
            const std::optional<Tensor>& window_pages, const std::optional<Tensor>& window_table,
            const Tensor& output) {
    Step step{};
    step.layer = &codec.layer;
    step.query = tokens_of(query);
    step.group = static_cast<int>(query.size(1) / codec.layer.heads);
    step.scale = static_cast<float>(scale);
    step.pages = pages_of(pages);
    step.sequences = static_cast<int>(seq_lens.numel());
    step.query_start = indices_of(query_start);
    const Tensor lengths = seq_lens.contiguous();
    step.seq_lens = indices_of(lengths);
    step.table = indices_of(block_table);
    step.table_stride = block_table.stride(0);
    TORCH_CHECK(output.stride(2) == 1 && output.stride(1) == codec.layer.dim, "heads of the output must be contiguous");
    step.output = output.data_ptr();
    step.output_dtype = dtype_of(output);
    step.output_token_stride = output.stride(0);
    step.threads = at::get_num_threads();
    if (window_pages) {
        const int64_t item = size_of(dtype_of(*window_pages));
        TORCH_CHECK(window_pages->stride(3) == 1 && window_pages->stride(2) == 2 * codec.layer.dim,
                    "a window's tokens must be contiguous");
        step.window = {static_cast<const uint8_t*>(window_pages->const_data_ptr()),
                       dtype_of(*window_pages),
                       window_pages->stride(0) * item,
                       window_pages->stride(1) * item,
                       static_cast<int>(window_pages->size(2)),
                       window_size,
                       whole_chunk,
                       indices_of(*window_table),
                       window_table->stride(0)};
    }
    int64_t longest = 0;
    for (int s = 0; s < step.sequences; ++s) longest = std::max<int64_t>(longest, step.seq_lens[s]);
    if (codec.rotary) {
        codec.rotary->reach_position(longest - 1);
        codec.rotary->reach_context(longest);
    }
    available().at(isa)->attend(step);
}

}  // namespace
}  // namespace kvsplice

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
    using namespace kvsplice;
    py::class_<Codec>(module, "Codec")
        .def(py::init<const std::map<std::string, Tensor>&, const std::map<std::string, Tensor>&, const Widths&,
                      const Widths&, const Widths&, const Widths&, const std::optional<Tensor>&, bool, int64_t>());
    module.def("instruction_sets", &instruction_sets, "Names of those this processor has, best first.");
    module.def("write", &kvsplice::write, py::call_guard<py::gil_scoped_release>());
    module.def("write_window", &write_window, py::call_guard<py::gil_scoped_release>());
    module.def("attend", &kvsplice::attend, py::call_guard<py::gil_scoped_release>());
}
