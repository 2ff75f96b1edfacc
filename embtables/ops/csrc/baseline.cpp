// What every processor of the architecture can do. Linked first: of the standard library's templates, which all three
// compile, the linker keeps the first.
#define EMBTABLES_INSTRUCTIONS baseline
#include "kernels.h"

namespace embtables {
EMBTABLES_FUNCTIONS(baseline)
}  // namespace embtables
