// Included last: all functions that follow in the file round each product before they add it, as Pillow does,
// although the extension is compiled with -ffp-contract=fast.
#ifdef __clang__
#pragma clang fp contract(off)
#else
#pragma GCC optimize("fp-contract=off")
#endif
