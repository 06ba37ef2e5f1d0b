"""How many floating-point operations a second a GPU can do at best, by the name that its driver gives it."""

import re

# Dense peaks of one GPU in TFLOP/s, from the vendor's data sheets and architecture white papers: of half-precision
# products that are added up in float32, which is what training uses, and of float32 without tensor cores. A name that
# says more than these (a laptop's card, a MIG slice, a card for one customer) has another peak, and is not here.
PEAK_TFLOPS = {
    "b300": (2250, 75), "gb300": (2500, 80), "b200": (2250, 75), "gb200": (2500, 80),
    "h200": (989, 67), "h200 nvl": (835, 60), "gh200": (989, 67), "h100": (989, 67), "h100 nvl": (835, 60),
    "h100 pcie": (756, 51), "h800": (989, 67), "h800 pcie": (756, 51), "h20": (148, 44), "h20 3e": (148, 44),
    "a100": (312, 19.5), "a100 pcie": (312, 19.5), "a800": (312, 19.5), "a800 pcie": (312, 19.5),
    "a40": (149.7, 37.4), "a30": (165, 10.3), "a16": (17.9, 4.5), "a10": (125, 31.2), "a10g": (70, 35),
    "a2": (18, 4.5), "l40s": (362, 91.6), "l40": (181, 90.5), "l20": (119.5, 59.8), "l4": (121, 30.3),
    "v100": (125, 15.7), "v100 pcie": (112, 14), "v100s pcie": (130, 16.4), "t4": (65, 8.1),
    "rtx pro 6000 blackwell workstation edition": (503.8, 126), "rtx pro 6000 blackwell server edition": (480, 120),
    "rtx pro 6000 blackwell max q workstation edition": (438.9, 110),
    "rtx 6000 ada generation": (364.2, 91.1), "rtx 5000 ada generation": (261.1, 65.3),
    "rtx 4500 ada generation": (158.5, 39.6), "rtx 4000 ada generation": (106.9, 26.7),
    "rtx a6000": (154.8, 38.7), "rtx a5000": (111.1, 27.8), "rtx a4500": (94.6, 23.7), "rtx a4000": (76.7, 19.2),
    "rtx 5090": (209.5, 104.8), "rtx 5080": (112.6, 56.3), "rtx 5070 ti": (87.9, 43.9), "rtx 5070": (61.7, 30.9),
    "rtx 4090": (165.2, 82.6), "rtx 4090 d": (147.1, 73.5), "rtx 4080 super": (104.4, 52.2), "rtx 4080": (97.5, 48.7),
    "rtx 4070 ti super": (88.2, 44.1), "rtx 4070 ti": (80.2, 40.1), "rtx 4070 super": (71, 35.5),
    "rtx 4070": (58.3, 29.1), "rtx 4060 ti": (44.1, 22.1), "rtx 4060": (30.2, 15.1),
    "rtx 3090 ti": (80, 40), "rtx 3090": (71, 35.6), "rtx 3080 ti": (68.2, 34.1), "rtx 3080": (59.5, 29.8),
    "rtx 3070 ti": (43.5, 21.7), "rtx 3070": (40.6, 20.3), "rtx 3060 ti": (32.4, 16.2), "rtx 3060": (25.5, 12.7),
}  # fmt: skip
# Words that do not change the peak: maker, series, socket and memory; but 64 GB is an A100 of another size.
WITHOUT_MEANING = re.compile(r"nvidia|geforce|tesla|sxm\d?|ac|hbm\d\w*|(?!64gb)\d+gb?")


def peak_flops_per_second(device_name: str, use_amp: bool) -> float | None:
    """Return the dense peak of a GPU in FLOP/s, in half precision or in float32, or None where it is not known."""
    words = re.split(r"[\s-]+", device_name.lower())
    peaks = PEAK_TFLOPS.get(" ".join(word for word in words if not WITHOUT_MEANING.fullmatch(word)))
    return None if peaks is None else peaks[0 if use_amp else 1] * 1e12
