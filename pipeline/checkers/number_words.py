"""Words that stand behind numbers: scales, units of measure, and words that make another number."""

from __future__ import annotations

SCALES = {
    "dozen": 12, "hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9,
    "trillion": 10**12,
}  # fmt: skip
_ALTERING_WORDS = """
and or to nor not plus minus times over under above below than more less fewer greater except
least most squared cubed factorial choose mod modulo pi tau sqrt root roots log ln sin cos tan
infinity infinite half halves third thirds fourth fourths fifth fifths sixth sixths seventh
sevenths eighth eighths ninth ninths tenth tenths hundredth hundredths thousandth thousandths
millionth millionths quadrillion quintillion zillion gazillion myriad bil bill bln tril tn mill
mln mn thou tsd grand cr ppm ppb permille bps negative repeating recurring point one two three
four five six seven eight nine ten eleven twelve twenty thirty forty fifty sixty seventy eighty
ninety twelfths sixteenths twentieths tausend millionen milliarden mrd mille milliers milliard
milliards mil millones cientos millón milhões milhão bilhões milioni miliardi тысяча тысячи тысяч
миллион миллиона миллионов миллиард миллиарда миллиардов ألف آلاف مليون triệu nghìn ngàn tỷ juta
ribu miliar milyon milyar bin लाख करोड़ हज़ार quarter quarters score gross lakh lakhs crore crores
mio bn hundreds thousands millions billions trillions dozens power remainder am pm bc bce ad ish
"""
ALTERING = frozenset(_ALTERING_WORDS.split()) | SCALES.keys()
"""Words behind a number that make it another one, so that they are no unit."""
ALTERING_CHARACTERS = frozenset("十百千万萬亿億半多余几倍分折成或至到以만억천백반")
"""The same in scripts without spaces."""
_SENTENCE_WORDS = "is isn are was were be can cannot could would if but because since so"
VERBS = frozenset(_SENTENCE_WORDS.split())
"""Words that make a sentence of a number and what is behind it."""
_SHORT_WORDS = "in of at on by if he we it us up so as an"
PROSE = frozenset(_SHORT_WORDS.split())
"""Words of two letters that go on with the sentence; others are products of variables."""
_PREFIXES = ["p", "n", "μ", "u", "m", "k", "K", "M", "G", "T"]
_PREFIXED = "J W V A Hz Pa N eV mol cal B"
UNITS = {
    name: names.split()[0]
    for names in (
        "mm millimeter millimeters millimetre millimetres",
        "cm centimeter centimeters centimetre centimetres",
        "m meter meters metre metres",
        "km kilometer kilometers kilometre kilometres",
        "inch inches",
        "foot feet ft",
        "yard yards yd",
        "mile miles mi",
        "mg milligram milligrams",
        "g gram grams",
        "kg kilogram kilograms",
        "ounce ounces oz",
        "pound pounds lb lbs gbp GBP \u00a3",
        "ml mL milliliter milliliters millilitre millilitres",
        "liter liters litre litres l L",
        "second seconds s sec secs",
        "minute minutes min mins",
        "hour hours h hr hrs",
        "day days",
        "week weeks",
        "month months",
        "year years",
        "dollar dollars usd USD $",
        "cent cents",
        "euro euros eur EUR \u20ac",
        "yen jpy JPY \u00a5",
        "rupee rupees inr INR \u20b9 Rs",
        "degree degrees",
        "radian radians rad",
        "C Celsius celsius",
        "F Fahrenheit fahrenheit",
        "% percent",
        "gallon gallons gal",
        "quart quarts qt",
        "pint pints pt",
        "cup cups",
        "ton tons tonne tonnes",
        "bit bits",
        "byte bytes",
        "pence penny pennies",
        "peso pesos",
        "kph kmh",
        "acre acres",
        "hectare hectares ha",
        *(prefix + unit for prefix in ("", *_PREFIXES) for unit in _PREFIXED.split()),
        *("ps", "ns", "\u03bcs", "ms", "pm", "nm", "\u03bcm", "\u03bcg"),
    )
    for name in names.split()
}
"""First name of each unit by all its names; other words behind a number are not compared."""
_GLUED_WORDS = "mm cm km kg mg ml mL ft yd mi oz lb lbs mph min mins sec secs hr hrs"
GLUED_UNITS = frozenset(_GLUED_WORDS.split())
"""Units that may follow their number without a space."""
