// A device of torch whose tensors lie in CPU memory. See __init__.py for what it is good for.
//
// It takes the place of MTIA, a backend that no wheel of torch fills: like CUDA, and unlike PrivateUse1, MTIA is one of torch's dense
// backends, so Module.to swaps the data of parameters and keeps the objects. Torch asks for it before it asks for CUDA,
// and has an autocast for it with CUDA's own lists.

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/SDPBackend.h>
#include <ATen/NativeFunctions.h>
#include <ATen/detail/MTIAHooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/native/TensorFactories.h>
#include <ATen/native/transformers/attention.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/util/ScopeExit.h>
#include <torch/library.h>

#include <atomic>
#include <map>
#include <mutex>
#include <set>

using at::Tensor;
using c10::DeviceType;

namespace {

// --- what is counted ---------------------------------------------------------------------------------------------------------------

std::mutex counts_mutex;
std::map<std::string, int64_t> counts;
std::atomic<bool> is_counting{false};

thread_local bool is_inside_operator = false;  // copies there stand for the device's reading of its own memory

void count(const std::string& name) {
  if (!is_counting || is_inside_operator) return;
  std::lock_guard<std::mutex> guard(counts_mutex);
  counts[name]++;
}

std::vector<std::string> counted_lines() {
  std::lock_guard<std::mutex> guard(counts_mutex);
  std::vector<std::string> lines;
  for (const auto& [name, number] : counts) lines.push_back(name + "\t" + std::to_string(number));
  return lines;
}

void start_counting() {
  std::lock_guard<std::mutex> guard(counts_mutex);
  counts.clear();
  is_counting = true;
}

// --- memory ------------------------------------------------------------------------------------------------------------------------

std::atomic<int64_t> allocated_bytes{0}, peak_bytes{0}, limit_bytes{int64_t{1} << 40};

struct Block {
  void* data;
  int64_t bytes;
};

struct StandinAllocator final : at::Allocator {
  static void release(void* context) {
    auto* block = static_cast<Block*>(context);
    allocated_bytes -= block->bytes;
    free(block->data);
    delete block;
  }
  at::DataPtr allocate(size_t bytes) override {
    const auto size = static_cast<int64_t>(bytes);
    TORCH_CHECK_WITH(OutOfMemoryError, allocated_bytes + size <= limit_bytes, "stand-in out of memory. Tried to allocate ", size, " bytes.");
    void* data = nullptr;
    if (bytes && posix_memalign(&data, 64, bytes)) throw std::bad_alloc();
    allocated_bytes += size;
    if (allocated_bytes > peak_bytes) peak_bytes = allocated_bytes.load();
    return {data, new Block{data, size}, &release, at::Device(DeviceType::MTIA, 0)};
  }
  at::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* target, const void* source, size_t bytes) const override { default_copy_data(target, source, bytes); }
};
StandinAllocator allocator;
REGISTER_ALLOCATOR(DeviceType::MTIA, &allocator);

// --- the device: one, with one stream ------------------------------------------------------------------------------------------------

struct StandinGuard : c10::impl::DeviceGuardImplInterface {
  static at::Device only_device() { return at::Device(DeviceType::MTIA, 0); }
  static c10::Stream only_stream() { return c10::Stream(c10::Stream::DEFAULT, only_device()); }
  DeviceType type() const override { return DeviceType::MTIA; }
  at::Device exchangeDevice(at::Device) const override { return only_device(); }
  at::Device getDevice() const override { return only_device(); }
  void setDevice(at::Device) const override {}
  void uncheckedSetDevice(at::Device) const noexcept override {}
  c10::Stream getStream(at::Device) const noexcept override { return only_stream(); }
  c10::Stream getNewStream(at::Device, int) const override { return only_stream(); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return only_stream(); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void** event, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override { if (event) *event = (void*)1; }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
};

// Host memory that a device reads by itself, while the host goes on. Copies from other memory are waited for.
std::mutex pinned_mutex;
std::map<const char*, size_t> pinned;  // bytes from each start

bool is_pinned(const void* data) {
  const std::lock_guard<std::mutex> lock(pinned_mutex);
  const auto* at = static_cast<const char*>(data);
  const auto after = pinned.upper_bound(at);
  return after != pinned.begin() && at < std::prev(after)->first + std::prev(after)->second;
}

struct PinnedAllocator final : at::Allocator {
  static void release(void* data) {
    const std::lock_guard<std::mutex> lock(pinned_mutex);
    pinned.erase(static_cast<const char*>(data));
    free(data);
  }
  at::DataPtr allocate(size_t bytes) override {
    void* data = nullptr;
    if (bytes && posix_memalign(&data, 64, bytes)) throw std::bad_alloc();
    const std::lock_guard<std::mutex> lock(pinned_mutex);
    if (bytes) pinned[static_cast<const char*>(data)] = bytes;
    return {data, data, &release, at::Device(at::kCPU)};
  }
  at::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* target, const void* source, size_t bytes) const override { default_copy_data(target, source, bytes); }
};
PinnedAllocator pinned_allocator;

struct StandinHooks final : at::MTIAHooksInterface {
  void init() const override {}
  bool hasMTIA() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(at::DeviceIndex) const override { return true; }
  at::Generator getNewGenerator(at::DeviceIndex) const override { return at::make_generator<at::CPUGeneratorImpl>(); }
  at::DeviceIndex deviceCount() const override { return 1; }
  at::Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator; }
  bool isPinnedPtr(const void* data) const override { return is_pinned(data); }
};

const StandinGuard guard;
const c10::impl::DeviceGuardImplRegistrar guard_registrar(DeviceType::MTIA, &guard);

// Autograd takes streams from one kind of device, the accelerator, which is this one once its hooks say so. Torch makes the hooks when
// it first asks for them, and keeps them: they can only be replaced in their place.
void become_accelerator() {
  static_assert(sizeof(StandinHooks) == sizeof(at::MTIAHooksInterface));
  new (const_cast<at::MTIAHooksInterface*>(&at::detail::getMTIAHooks())) StandinHooks();
}

// --- operators: the CPU's kernels on the same memory -----------------------------------------------------------------------------------

Tensor on_cpu(const Tensor& tensor) {
  const auto storage = tensor.storage();
  const auto elements = static_cast<int64_t>(storage.nbytes() / tensor.element_size());
  const auto whole = at::from_blob(storage.mutable_data(), {elements}, [storage](void*) {}, tensor.options().device(at::kCPU));
  return whole.as_strided(tensor.sizes(), tensor.strides(), tensor.storage_offset());
}

Tensor empty(c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<at::Device>,
             std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(size, &allocator, c10::DispatchKeySet(c10::DispatchKey::MTIA), dtype.value_or(at::kFloat), format);
}

Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                     std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &allocator, c10::DispatchKeySet(c10::DispatchKey::MTIA), dtype.value_or(at::kFloat));
}

Tensor copy_from(const Tensor& source, const Tensor& target, bool is_non_blocking) {
  const bool is_from_device = source.is_mtia(), is_to_device = target.is_mtia();
  if (is_from_device && !is_to_device) count("copy to host");
  if (!is_from_device && is_to_device) {
    count("copy to device");
    const auto bytes = source.numel() * source.element_size();
    if (bytes && !(is_non_blocking && is_pinned(source.const_data_ptr()))) count("synchronisation");
  }
  if (is_from_device && is_to_device) count("copy on device");
  auto here = is_to_device ? on_cpu(target) : target;
  here.copy_(is_from_device ? on_cpu(source) : source);
  return target;
}

Tensor copy_from_and_resize(const Tensor& source, const Tensor& target) {
  target.resize_(source.sizes());
  return copy_from(source, target, false);
}

at::Scalar local_scalar(const Tensor& tensor) {
  count("synchronisation");
  return at::_local_scalar_dense(on_cpu(tensor));
}

Tensor as_strided(const Tensor& self, c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<int64_t> offset) {
  return at::native::as_strided_tensorimpl(self, size, stride, offset);
}
Tensor reshape_alias(const Tensor& self, c10::IntArrayRef size, c10::IntArrayRef stride) { return at::native::as_strided_tensorimpl(self, size, stride, std::nullopt); }
Tensor view(const Tensor& self, c10::IntArrayRef size) { return at::native::view(self, size); }
Tensor view_dtype(const Tensor& self, at::ScalarType dtype) { return at::native::view_dtype(self, dtype); }
Tensor unfold(const Tensor& self, int64_t dimension, int64_t size, int64_t step) { return at::native::unfold(self, dimension, size, step); }
const Tensor& resize(const Tensor& self, c10::SymIntArrayRef size, std::optional<at::MemoryFormat> format) {
  return at::native::resize_(self, C10_AS_INTARRAYREF_SLOW(size), format);
}
Tensor& set_storage(Tensor& self, at::Storage storage, int64_t offset, c10::IntArrayRef size, c10::IntArrayRef stride) {
  return at::native::set_storage_cpu_(self, std::move(storage), offset, size, stride);
}

void check_one_device(const std::string& name, bool has_device, bool has_cpu) {
  TORCH_CHECK(!(has_device && has_cpu), "Expected all tensors to be on the same device, but found at least two devices, mtia:0 and cpu! (", name, ")");
}

Tensor convolution(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, c10::SymIntArrayRef stride, c10::SymIntArrayRef padding,
                   c10::SymIntArrayRef dilation, bool is_transposed, c10::SymIntArrayRef output_padding, c10::SymInt groups) {
  count("aten::convolution");
  const bool has_bias = bias && bias->defined();
  check_one_device("convolution", true, !x.is_mtia() || !weight.is_mtia() || (has_bias && !bias->is_mtia()));
  const auto here = has_bias ? std::optional<Tensor>(on_cpu(*bias)) : std::nullopt;
  auto y = at::convolution_symint(on_cpu(x), on_cpu(weight), here, stride, padding, dilation, is_transposed, output_padding, groups);
  auto result = at::empty_like(y, y.options().device(x.device()));
  on_cpu(result).copy_(y);
  return result;
}

std::tuple<Tensor, Tensor, Tensor> convolution_backward(const Tensor& gradient, const Tensor& x, const Tensor& weight, c10::SymIntArrayRef stride,
                                                        c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation, bool is_transposed,
                                                        c10::SymIntArrayRef output_padding, c10::SymInt groups, std::array<bool, 3> wanted) {
  count("aten::convolution_backward");
  const std::vector<c10::SymInt> bias_sizes{weight.sym_size(0)};
  const auto found = at::convolution_backward_symint(on_cpu(gradient), on_cpu(x), on_cpu(weight), c10::SymIntArrayRef(bias_sizes), stride, padding,
                                                     dilation, is_transposed, output_padding, groups, wanted);
  const auto placed = [&](const Tensor& each) {
    if (!each.defined()) return each;
    auto result = at::empty_like(each, each.options().device(x.device()));
    on_cpu(result).copy_(each);
    return result;
  };
  return {placed(std::get<0>(found)), placed(std::get<1>(found)), placed(std::get<2>(found))};
}

// As on CUDA, a norm and an attention are one operator each, where torch would otherwise compose them of a dozen.
Tensor placed(const Tensor& here, const Tensor& like) {
  auto result = at::empty_strided(here.sizes(), here.strides(), here.options().device(like.device()));
  on_cpu(result).copy_(here);
  return result;
}

std::tuple<Tensor, Tensor, Tensor> layer_norm(const Tensor& x, c10::SymIntArrayRef shape, const std::optional<Tensor>& weight,
                                              const std::optional<Tensor>& bias, double eps) {
  count("aten::native_layer_norm");
  const auto here = [](const std::optional<Tensor>& each) { return each && each->defined() ? std::optional<Tensor>(on_cpu(*each)) : std::nullopt; };
  const auto found = at::native_layer_norm_symint(on_cpu(x), shape, here(weight), here(bias), eps);
  return {placed(std::get<0>(found), x), placed(std::get<1>(found), x), placed(std::get<2>(found), x)};
}

int64_t attention_choice(const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>& mask, double dropout, bool,
                         std::optional<double>, bool) {
  return mask || dropout ? int64_t(at::SDPBackend::math) : int64_t(at::SDPBackend::overrideable);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, c10::SymInt, c10::SymInt, Tensor, Tensor, Tensor> attention(
    const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>&, double, bool is_causal, bool,
    std::optional<double> scale) {
  count("aten::attention");
  const auto found = at::_scaled_dot_product_flash_attention_for_cpu(on_cpu(query), on_cpu(key), on_cpu(value), 0.0, is_causal, std::nullopt, scale);
  const auto none = at::empty({0}, query.options().dtype(at::kLong));
  return {placed(std::get<0>(found), query), placed(std::get<1>(found), query), none, none, query.sym_size(2), key.sym_size(2), none, none, none};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward(
    const Tensor& gradient, const Tensor& query, const Tensor& key, const Tensor& value, const Tensor&, std::array<bool, 4>, const Tensor& output,
    const Tensor& logsumexp, const Tensor&, const Tensor&, c10::SymInt, c10::SymInt, double, bool is_causal, const Tensor&, const Tensor&,
    std::optional<double> scale) {
  count("aten::attention_backward");
  const auto found = at::_scaled_dot_product_flash_attention_for_cpu_backward(on_cpu(gradient), on_cpu(query), on_cpu(key), on_cpu(value),
                                                                              on_cpu(output), on_cpu(logsumexp), 0.0, is_causal, std::nullopt, scale);
  return {placed(std::get<0>(found), query), placed(std::get<1>(found), query), placed(std::get<2>(found), query), Tensor()};
}

const auto registered_choice = [] {
  at::native::_fused_sdp_choice_stub.set_mtia_dispatch_ptr(&attention_choice);
  return true;
}();

// Every other operator. Where CUDA would wait for the device to know a result's size, that counts as a synchronisation.
void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  static const std::set<std::string> waiting{"aten::nonzero",   "aten::masked_select", "aten::unique_dim",         "aten::_unique2",
                                            "aten::bincount", "aten::equal",         "aten::unique_consecutive"};
  static const std::set<std::string> taking_cpu_indices{"aten::index", "aten::index_put_", "aten::_index_put_impl_", "aten::index_put"};
  const auto& name = op.schema().operator_name().name;
  count(name);
  if (waiting.count(name)) count("synchronisation");
  bool has_device = false, has_cpu = false;
  const auto look = [&](const Tensor& tensor) {
    if (!tensor.defined()) return;
    has_device |= tensor.is_mtia();
    has_cpu |= tensor.dim() > 0 && tensor.device().is_cpu();
  };
  for (const auto& argument : torch::jit::last(stack, op.schema().arguments().size())) {
    if (argument.isTensor()) look(argument.toTensor());
    if (argument.isTensorList()) for (const Tensor& each : argument.toTensorVector()) look(each);
  }
  if (!taking_cpu_indices.count(name)) check_one_device(name, has_device, has_cpu);
  const auto before = std::exchange(is_inside_operator, true);
  const auto restore = c10::make_scope_exit([before] { is_inside_operator = before; });
  at::native::cpu_fallback(op, stack);
}

} // namespace

TORCH_LIBRARY(standin, m) {
  m.def("become_accelerator() -> ()", become_accelerator);
  m.def("start_counting() -> ()", start_counting);
  m.def("stop_counting() -> ()", []() { is_counting = false; });
  m.def("counts() -> str[]", counted_lines);
  m.def("allocated_bytes() -> int", []() -> int64_t { return allocated_bytes; });
  m.def("peak_bytes() -> int", []() -> int64_t { return peak_bytes; });
  m.def("forget_peak() -> ()", []() { peak_bytes = allocated_bytes.load(); });
  m.def("limit_bytes() -> int", []() -> int64_t { return limit_bytes; });
  m.def("set_limit_bytes(int limit) -> ()", [](int64_t limit) { limit_bytes = limit; });
}

TORCH_LIBRARY_IMPL(_, MTIA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

TORCH_LIBRARY_IMPL(aten, MTIA, m) {
  m.impl("empty.memory_format", TORCH_FN(empty));
  m.impl("empty_strided", TORCH_FN(empty_strided));
  m.impl("_copy_from", TORCH_FN(copy_from));
  m.impl("_copy_from_and_resize", TORCH_FN(copy_from_and_resize));
  m.impl("_local_scalar_dense", TORCH_FN(local_scalar));
  m.impl("as_strided", TORCH_FN(as_strided));
  m.impl("_reshape_alias", TORCH_FN(reshape_alias));
  m.impl("view", TORCH_FN(view));
  m.impl("view.dtype", TORCH_FN(view_dtype));
  m.impl("unfold", TORCH_FN(unfold));
  m.impl("resize_", TORCH_FN(resize));
  m.impl("set_.source_Storage_storage_offset", TORCH_FN(set_storage));
  m.impl("convolution_overrideable", TORCH_FN(convolution));
  m.impl("convolution_backward_overrideable", TORCH_FN(convolution_backward));
  m.impl("native_layer_norm", TORCH_FN(layer_norm));
  m.impl("_scaled_dot_product_fused_attention_overrideable", TORCH_FN(attention));
  m.impl("_scaled_dot_product_fused_attention_overrideable_backward", TORCH_FN(attention_backward));
}
