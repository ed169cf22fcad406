#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

namespace nasfcos {

// While one of these lives, tensor operators run below autograd and autocast, whose work is done by
// the time our kernels are called. Threads of a parallel region do not inherit the dispatch state
// of the caller, so each needs its own.
struct PlainDispatch {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};
};

}  // namespace nasfcos
