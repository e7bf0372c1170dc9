"""Messy one-line records and questions about them: the data of the offline quickstart.

A record is a handful of ``key value`` pairs of one domain (people, orders, devices, ...), written the way
hand-kept lists are: separators, key names, casing and order vary, keys have typos, fields are missing, and
stray remarks and outdated values (``old tel``) stand between them. A question names one field; the answer
is its value, verbatim.

Training and held-out data are disjoint by construction: a hash of each open-vocabulary value (a name, a phone
number, ...) assigns that value to one split, and every record holds at least one such value.
"""

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from random import Random

HELDOUT_SHARE = 10  # one open value in ten is held out
MAX_FIELDS = 11
MAX_PROMPT_CHARS = 330  # keeps the longest prompts near 220 tokens


class Split(Enum):
    """Which half of the values a record draws from."""

    TRAIN = "train"
    HELDOUT = "heldout"

    def owns(self, value: str) -> bool:
        """Whether an open-vocabulary value belongs to this split."""
        return (zlib.crc32(value.encode()) % HELDOUT_SHARE == 0) == (self is Split.HELDOUT)


@dataclass(frozen=True, slots=True)
class Question:
    """One question on a record: the prompt is record + ``text``, its continuation a blank + ``answer``."""

    text: str
    answer: str


@dataclass(frozen=True, slots=True)
class Record:
    """One record and the questions that can be asked about it, in random order."""

    text: str
    questions: tuple[Question, ...]


@dataclass(frozen=True, slots=True)
class Field:
    """A field of a domain. An open one has too many values to list; the split decides who may use which."""

    keys: tuple[str, ...]  # the usual name first
    draw: Callable[[Random], str]
    is_open: bool

    def value(self, rng: Random, split: Split) -> str:
        """Draw a value that the split owns."""
        while True:
            value = self.draw(rng)
            if not self.is_open or split.owns(value):
                return value


def make_record(rng: Random, split: Split, max_fields: int = MAX_FIELDS) -> Record:
    """Draw one record of 1 to ``max_fields`` fields, with one question for each field."""
    fields = _pick_fields(rng, rng.randint(1, max_fields))
    separator, joiner = rng.choice(_SEPARATORS), rng.choice(_JOINERS)
    parts: list[str] = []
    questions: list[Question] = []
    text = _fill(rng, *_PREFIXES)
    for field in fields:
        value, key = field.value(rng, split), rng.choice(field.keys)
        own_joiner = joiner if rng.random() < 0.8 else rng.choice(_JOINERS)
        parts.append(_style_key(rng, key) + own_joiner + value)
        asked = field.keys[0] if rng.random() < 0.6 else rng.choice(field.keys)
        questions.append(Question(rng.choice(_QUESTIONS).format(asked), value))
        if rng.random() < 0.08:
            parts.append(_fill(rng, *_REMARKS))
    if len(fields) > 1 and rng.random() < 0.12:
        stale = rng.choice(fields)
        old = rng.choice(_STALE) + rng.choice(stale.keys) + joiner + stale.value(rng, split)
        parts.insert(rng.randint(0, len(parts)), old)
    text += parts[0]
    for part in parts[1:]:
        text += (separator if rng.random() < 0.85 else rng.choice(_SEPARATORS)) + part
    rng.shuffle(questions)
    return Record(text, tuple(questions))


def heldout_examples(seed: int) -> Iterator[tuple[str, str]]:
    """Endless distinct held-out (prompt, answer) pairs, one question a record."""
    rng = Random(seed)
    seen: set[str] = set()
    while True:
        record = make_record(rng, Split.HELDOUT)
        prompt = record.text + record.questions[0].text
        if len(prompt) <= MAX_PROMPT_CHARS and prompt not in seen:
            seen.add(prompt)
            yield prompt, record.questions[0].answer


def _pick_fields(rng: Random, count: int) -> list[Field]:
    """Fields of one domain in random order, at times with one of another domain; at least one is open."""
    domain = list(rng.choice(_DOMAINS))
    if rng.random() < 0.2:
        taken = {key for field in domain for key in field.keys}
        domain += [field for field in rng.choice(_DOMAINS) if taken.isdisjoint(field.keys)][:1]
    rng.shuffle(domain)
    first = next(field for field in domain if field.is_open)
    fields = [first, *[field for field in domain if field is not first][: count - 1]]
    rng.shuffle(fields)
    return fields


def _style_key(rng: Random, key: str) -> str:
    """Vary the casing of a key, and now and then misspell it."""
    if len(key) >= 4 and rng.random() < 0.04:
        at = rng.randrange(1, len(key) - 1)
        swapped = key[:at] + key[at + 1] + key[at] + key[at + 2 :]
        key = rng.choice((swapped, key[:at] + key[at + 1 :], key[:at] + key[at] + key[at:]))
    return rng.choice((key, key, key, key.capitalize(), key.capitalize(), key.upper()))


def _fill(rng: Random, *patterns: str) -> str:
    """Fill one of the patterns: 9 a digit, X a capital, ~ a hex digit, W and w a made-up word."""
    return "".join(_FILLERS[char](rng) if char in _FILLERS else char for char in rng.choice(patterns))


def _word(rng: Random) -> str:
    syllables = [_syllable(rng) for _ in range(rng.choice((1, 1, 2, 2, 3)))]
    return "".join(syllables) if len(syllables) > 1 else syllables[0] + rng.choice(_ENDINGS)


def _syllable(rng: Random) -> str:
    vowels = "aeiou" if rng.random() < 0.97 else "äéö"
    return rng.choice(_ONSETS) + rng.choice(vowels) + rng.choice(_CODAS)


def _date(rng: Random) -> str:
    year, month, day = rng.randint(1960, 2029), rng.randint(1, 12), rng.randint(1, 28)
    written = f"{day} {_MONTHS[month - 1]} {year}"
    return rng.choice((f"{year}-{month:02}-{day:02}", f"{day:02}/{month:02}/{year}", written))


def _person(rng: Random) -> str:
    first = rng.choice(_FIRST_NAMES) if rng.random() < 0.5 else _word(rng).capitalize()
    initial = f" {rng.choice(_CAPITALS)}." if rng.random() < 0.1 else ""
    return f"{first}{initial} {_word(rng).capitalize()}"


def _city(rng: Random) -> str:
    return rng.choice(_CITIES) if rng.random() < 0.3 else _word(rng).capitalize()


_words = str.split
_MONTHS = _words("Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec")
_CAPITALS = "ABCDEFGHJKLMNPRSTUVWXYZ"
_ONSETS = _words("b d f g h j k l m n p r s t v w z br dr gr kr pl sh st tr ch")
_CODAS = ["", "", "", "", "n", "r", "l", "s", "m", "k", "t", "nd", "rt"]
_ENDINGS = _words("ski sen ez ova man berg ton ley nen ini ko ard dal wick")
_FIRST_NAMES = _words("""
    Anna Maria Peter John Sofia Lucas Emma Ivan Olga Nina Omar Leila Hugo Clara Jonas Marta
    Tomas Eva Paul Ines Karl Rita Adam Lena Oscar Julia David Sara Felix Alice Bruno Irene
    Victor Hanna Simon Laura""")
_CITIES = _words("""
    Lodz Gdansk Porto Turin Lyon Leeds Bergen Malmö Graz Basel Ghent Brno Riga Vilnius Split
    Cork Bremen Kassel Ulm Sevilla Toledo Bari Genoa Nantes Lille Tours York Bath Derby Oulu
    Turku Espoo Aarhus Odense Pécs Szeged Sofia Varna Cluj Iasi Patras Osaka Kobe Nagoya Pune
    Surat Quito Lima Cusco Bogota""")
_FILLERS: dict[str, Callable[[Random], str]] = {
    "9": lambda rng: rng.choice("0123456789"),
    "X": lambda rng: rng.choice(_CAPITALS),
    "~": lambda rng: rng.choice("0123456789abcdef"),
    "W": lambda rng: _word(rng).capitalize(),
    "w": _word,
}


def _with(keys: str, draw: Callable[[Random], str]) -> Field:
    return Field(tuple(keys.split(",")), draw, is_open=True)


def _open(keys: str, *patterns: str) -> Field:
    return _with(keys, lambda rng: _fill(rng, *patterns))


def _closed(keys: str, options: str) -> Field:
    return Field(tuple(keys.split(",")), lambda rng: rng.choice(options.split(",")), is_open=False)


_PHONE = _open("phone,tel,telephone,mobile,cell", "555-9999", "+99 999 999 999", "(099) 999 9999", "099 9999")
_CITY = _with("city,town,place", _city)
_PRICE = _open("price,total,amount,cost", "$99.99", "999.99 EUR", "9999 PLN", "9.99 USD")
_DOMAINS: tuple[tuple[Field, ...], ...] = (
    (  # people
        _with("name,full name,person,contact", _person), _PHONE,
        _open("email,e-mail,mail", "w@w.com", "w.w@w.org", "w99@w.net", "w_w@w.io"), _CITY,
        _open("street,address,addr", "W St 99", "99 W Ave", "W Road 9"),
        _open("zip,postcode,zip code", "99999", "99-999"), _with("born,birth date,dob", _date),
        _closed("job,role,occupation", "nurse,driver,clerk,teacher,baker,pilot,cook"),
        _open("employer,company,firm", "W Ltd", "W & W", "W GmbH"),
    ),
    (  # orders
        _open("order,order id,order no", "99999", "XX-9999", "A99-999"),
        _with("customer,buyer,client", _person),
        _open("item,product,article", "W w", "w lamp", "W chair", "w 999"),
        _closed("qty,quantity,pieces", "1,2,3,4,5,10,12,24"), _PRICE, _with("date,ordered,order date", _date),
        _CITY, _PHONE, _open("courier,carrier", "W Post", "W"),
        _closed("status,state", "open,paid,shipped,on hold,cancelled,returned"),
        _open("tracking,parcel", "XX999999", "9X99-9999"),
    ),
    (  # devices
        _open("serial,serial no,sn", "XX9999X", "99X-9999", "S999999"),
        _open("model,type", "W 999", "X99", "W X9"), _open("vendor,maker,brand", "W", "W Inc"),
        _open("firmware,version,fw", "9.9.99", "v9.99", "99.9"),
        _open("ip,ip address", "10.9.99.99", "172.16.9.99"), _open("mac,mac address", "~~:~~:~~:~~:~~:~~"),
        _open("room,location", "X999", "W 9", "9.99"), _with("owner,user,assigned to", _person),
        _closed("os,system", "linux,windows,macos,android"), _with("warranty,expires", _date),
    ),
    (  # books
        _open("title,book,book title", "The W", "W and W", "The W of W", "A w W"),
        _with("author,writer,by", _person), _open("publisher,press", "W Press", "W & W", "W Books"),
        _closed("year,published", "1931,1954,1968,1977,1986,1995,2003,2011,2020"),
        _open("isbn,isbn 13", "978-9-99-999999-9", "979-99-9999-999-9"),
        _closed("language,lang", "English,Polish,German,French,Finnish"), _open("pages,length", "999"),
        _open("shelf,call number", "X9-99", "XX 999"), _PRICE,
    ),
    (  # vehicles
        _open("plate,registration,reg", "XX 99 XXX", "XXX-999", "X999XX"),
        _open("make,manufacturer", "W", "W Motors"),
        _closed("color,colour,paint", "red,blue,white,black,silver,dark green"),
        _open("mileage,odometer,km", "99999", "999 999"), _with("driver,driven by", _person),
        _closed("fuel,energy", "petrol,diesel,electric,hybrid,lpg"),
        _open("vin,chassis", "X9XX99X9999", "XXX9X999999"), _with("inspection,next check", _date), _CITY,
    ),
)  # fmt: skip
_SEPARATORS = ("; ", "; ", ";", " ;", " | ", " | ", "|", ", ", ", ", ",", " , ", "\t")
_JOINERS = (": ", ": ", ":", "=", "= ", " = ", " : ", " ")
_PREFIXES = ("", "", "", "#99# ", "#9999 | ", "line 99: ", "REC 9999; ", "[99] ", ">> ", "id 999, ", "w: ")
_REMARKS = (
    "(urgent)", "pls check", "??", "n/a", "note: call back", "w", "w w", "(w)", "misc 99", "see w", "--",
)  # fmt: skip
_STALE = ("old ", "prev ", "former ", "ex-")
_QUESTIONS = (
    " // extract {} ->", " // extract {} ->", " // {} ->", " // get {} ->", " // what is the {}? answer:",
    " | give the {}:", " => {} =", " // which {}?", " -> {}:",
)  # fmt: skip
