// SIMT_ADDRESS_SANITIZER: whether this is a build with AddressSanitizer, which has to be told of other stacks and of guard zones.
#pragma once

#if defined(__SANITIZE_ADDRESS__)
#define SIMT_ADDRESS_SANITIZER 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define SIMT_ADDRESS_SANITIZER 1
#endif
#endif
