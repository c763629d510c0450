// The attention of attention.hpp as Python calls it.

#include <sys/syscall.h>
#include <unistd.h>

#include "attention.hpp"

extern "C" {

// Whether the operating system gives this process AMX's tiles, where it needs them; asked once, before `attend`.
int allowed() {
#ifdef __AMX_BF16__
  return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0;
#else
  return 1;
#endif
}

void attend(const bfloat16* query, const bfloat16* key, const bfloat16* value, bfloat16* out, const int64_t* steps,
            int rows, int heads, int queries, int keys, int size, float scale, int threads) {
  attention::attend(query, key, value, out, steps, rows, heads, queries, keys, size, scale, threads);
}

}  // extern "C"
