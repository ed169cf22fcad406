#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

namespace nasfcos {

// Tensor operators within ours are called without autograd, and without autocast, whose dtype is
// decided by now. The threads of a parallel region know nothing of the caller's dispatch state, and
// need one of these each.
struct PlainDispatch {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};
};

}  // namespace nasfcos
