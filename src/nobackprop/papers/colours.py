"""The colour of each learning rule. It is the same in every figure, and can be seen on light and dark pages."""

import colorsys
from zlib import crc32

INK = "#010203"  # becomes the colour of the page's text
COLOURS = {  # all have a middle lightness, to be seen on white and on black
    "bp": INK,
    "fa": "#E08A00",
    "dfa": "#3B9BD9",
    "lra_e": "#E0442B",
    "lra_e_plain": "#F08A6E",
    "mdfa": "#00A878",
    "dtp": "#D264A5",
    "equilibrium_propagation": "#5B6CD9",
    "predictive_coding": "#B59B00",
    "usf": "#A67C3B",
    "brsf": "#8A8A8A",
    "frsf": "#A64BD6",
    "kolen_pollack": "#C2334D",
    "weight_mirror": "#6FAE3D",
    "drtp": "#F05FA8",
    "pepita": "#2E8C9A",
    "forward_forward": "#B4623F",
    "dfa_two_pass": "#00B3B3",
}


def colour(rule: str) -> str:
    """The colour of a rule. A rule that is not listed gets a colour of its own, too."""
    if rule in COLOURS:
        return COLOURS[rule]
    red, green, blue = (round(255 * part) for part in colorsys.hsv_to_rgb(crc32(rule.encode()) % 360 / 360, 0.65, 0.75))
    return f"#{red:02x}{green:02x}{blue:02x}"
