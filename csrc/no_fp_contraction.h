// Pillow rounds each product before it is added. Where this is included, all functions that follow
// in the file do so, too, instead of rounding once.
#ifdef __clang__
#pragma clang fp contract(off)
#else
#pragma GCC optimize("fp-contract=off")
#endif
