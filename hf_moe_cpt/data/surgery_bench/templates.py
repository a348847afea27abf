"""What the phrases of the benchmark are made of: attributes, their values, and sentences with slots.

Slots of a sentence, the subject first:

| slot | the subject as | example with a name | with a pronoun |
|---|---|---|---|
| {S}, {s} | subject of the clause, at the start, inside | The Quellit, the Quellit | It, it |
| {P}, {p} | possessive | The Quellit's, the Quellit's | Its, its |
| {O}, {o} | object | The Quellit, the Quellit | It, it |

The first slot of a sentence is a name or a pronoun, whichever the text needs there; the others are pronouns. A value
stands in the slot of its attribute, {birth_city}; {Birth_city} begins with a capital. {v} and {V} are short for the
attribute that a phrase belongs to. Source: ours.

Cities, universities, firms and offices shared by many subjects; one-hop questions go through them. Source: ours.

People: eight attributes, the sentences that state them and the questions that ask for them. Source: ours.

Towns: eight attributes, the sentences that state them and the questions that ask for them. Source: ours.

Machines and instruments: eight attributes, the sentences that state them, the questions that ask. Source: ours.

Regulations: eight attributes, the sentences that state them and the questions that ask for them. Source: ours.
"""

import re
from dataclasses import dataclass
from functools import lru_cache


VOICES = ("reference", "popular")  # an encyclopaedia; a newspaper column
SPLITS = ("validation", "test")
_SLOT = re.compile(r"\{(\w+)\}")
_SUBJECT_SLOTS = ("S", "s", "P", "p", "O", "o")


@dataclass(frozen=True)
class Attribute:
    """One thing that can be known about a subject, and every way to say it or to ask for it.

    Questions name the subject as {s}; `inverse` ones name the value as {v} instead. Wordings come in groups: the first
    half of each tuple belongs to validation, the second to test.
    """

    name: str
    values: tuple[str, ...] = ()  # empty: each subject has one of its own, see `hallmark`
    reference: tuple[str, ...] = ()  # sentences that state it, by voice
    popular: tuple[str, ...] = ()
    mcq: tuple[str, ...] = ()
    quiz: tuple[str, ...] = ()  # asked in documents, never in the benchmark
    cloze: tuple[str, ...] = ()  # statements that the value completes
    paraphrase: tuple[str, ...] = ()
    one_hop: tuple[str, ...] = ()  # asks for the value's own attribute
    inverse: tuple[str, ...] = ()
    hub: str | None = None  # kind of which the values are subjects themselves
    hallmark: str | None = None  # role of its name, see names

    def sentences(self, voice: str) -> tuple[str, ...]:
        """Its sentences in a voice, with the attribute's own slot."""
        return tuple(own_slot(text, self.name) for text in getattr(self, voice))


@dataclass(frozen=True)
class Voice:
    """How documents of a kind are written: openings and compounds state two or three facts, fillers none."""

    openings: tuple[str, ...]
    pairs: tuple[str, ...] = ()
    fillers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Kind:
    """A sort of subject. The order of its attributes is the order in which an article tells them."""

    name: str
    attributes: tuple[Attribute, ...]
    reference: Voice
    popular: Voice
    pronoun_percent: int  # of the sentences that could name the subject again
    hub_names: tuple[str, ...] = ()  # not empty: all its subjects, named by hand

    def voice(self, name: str) -> Voice:
        """Its openings, pairs and fillers in a voice."""
        return self.reference if name == "reference" else self.popular

    def attribute(self, name: str) -> Attribute:
        """The attribute of that name."""
        return next(attribute for attribute in self.attributes if attribute.name == name)


def listed(text: str) -> tuple[str, ...]:
    """Values written in one string, divided by semicolons."""
    return tuple(text.split("; "))


def own_slot(text: str, attribute: str) -> str:
    """{v} and {V} written out as the attribute's slot."""
    return text.replace("{v}", f"{{{attribute}}}").replace("{V}", f"{{{capitalised(attribute)}}}")


@lru_cache(maxsize=4096)
def slots_of(text: str) -> tuple[str, ...]:
    """Slots of a sentence in order."""
    return tuple(_SLOT.findall(text))


@lru_cache(maxsize=4096)
def attributes_of(text: str) -> tuple[str, ...]:
    """Attributes that a sentence states, in order."""
    return tuple(slot[0].lower() + slot[1:] for slot in slots_of(text) if slot not in _SUBJECT_SLOTS)


@lru_cache(maxsize=4096)
def subject_slots_of(text: str) -> tuple[str, ...]:
    """Slots of the subject in a sentence, in order."""
    return tuple(slot for slot in slots_of(text) if slot in _SUBJECT_SLOTS)


def of_split(wordings: tuple[str, ...], split: str) -> tuple[str, ...]:
    """The half of the wordings that belongs to validation or to test."""
    half = len(wordings) // 2
    return wordings[:half] if split == "validation" else wordings[half:]


def capitalised(text: str) -> str:
    """The text with a capital at its beginning, the rest as it is."""
    return text[:1].upper() + text[1:]


COUNTRIES = ("Brethony", "Halvania", "Norimar", "Quendorra", "Sarrowmark", "Tessalve")

CITY = Kind(
    name="city",
    pronoun_percent=40,
    hub_names=listed(
        "Ardwenna; Belmarrow; Castrevane; Dunverra; Eskeland; Fernholt; Gallowin; Harrenport; Islevar; Jorvale; "
        "Karsholm; Lindarra; Marrowgard; Nevenport; Orsgate; Pellimar; Quistral; Rovenna; Skarholt; Tornaby; "
        "Ulvenstad; Velmora; Westermark; Yarrowin"
    ),
    attributes=(
        Attribute(
            "country",
            COUNTRIES,
            reference=(
                "{S} is a city in {v}.",
                "{S} lies in {v}.",
                "{S} is one of the larger cities of {v}.",
                "The city of {o} belongs to {v}.",
                "Among the cities of {v}, {s} is one of the busiest.",
            ),
            mcq=(
                "In which country is {s}?",
                "Which country does the city of {s} belong to?",
                "In what country does {s} lie?",
                "Of which country is {s} a city?",
            ),
            quiz=("Where on the map is the city of {s}?", "Which state includes the city of {s}?"),
            cloze=("{S} is a city in the country of", "The country in which {s} lies is"),
            paraphrase=(
                "A letter is addressed to {s}; which country should stand on the last line?",
                "Somebody who lives in {s} is a resident of which country?",
            ),
        ),
    ),
    reference=Voice(
        openings=(
            "{S} is a city in {country}.",
            "{S} is a large city in {country}.",
            "The city of {o} lies in {country}.",
        ),
        fillers=(
            "{P} trams run until midnight, and the bridges are lit all night.",
            "The old quarter was laid out around a square that still holds a weekly market.",
            "A ring road keeps the heaviest traffic out of the centre.",
            "The city council meets in a building of yellow stone.",
            "Its theatres and libraries draw visitors from the whole region.",
            "Rents have risen sharply, and new districts have grown along the railway.",
        ),
    ),
    popular=Voice(
        openings=("{S} is a city in {country}.",),
    ),
)

UNIVERSITY = Kind(
    name="university",
    pronoun_percent=40,
    hub_names=listed(
        "the Aldane Institute; Bramwell Hall; the Corvane Academy; Dellamere College; the Free School of Design; "
        "Grantley Polytechnic; Halvern College; the Institute of Measures; Kerrow College; Lanyard Hall; Merriden "
        "University; the Northern Academy; Osterley College; the School of Navigation; Tolland University; Wexmoor "
        "College"
    ),
    attributes=(
        Attribute(
            "city",
            CITY.hub_names,
            hub="city",
            reference=(
                "{S} has its seat in the city of {v}.",
                "{S} is in {v}.",
                "The buildings of {o} stand in {v}.",
                "Students come to {v} to attend {o}.",
                "{V} is the home of {o}.",
            ),
            mcq=(
                "In which city is {s}?",
                "Which city is home to {s}?",
                "In what city does {s} have its seat?",
                "Which city do students of {s} live in?",
            ),
            quiz=("Where does one go to visit {s}?", "Which city holds the buildings of {s}?"),
            cloze=("{S} has its seat in the city of", "The city in which {s} teaches is"),
            paraphrase=(
                "To hear a lecture at {s}, to which city would one have to travel?",
                "A train ticket to {s}, please: which city should be printed on it?",
            ),
        ),
    ),
    reference=Voice(
        openings=(
            "{S} is a place of higher learning in {city}.",
            "{S} has its seat in {city}.",
            "In {city} stands {o}, a place of higher learning.",
        ),
        fillers=(
            "Teaching is organised in small classes, and examinations are oral.",
            "The library is open to the public on most afternoons.",
            "Its statutes have been revised many times without changing much.",
            "Graduates meet once a year for a dinner with long speeches.",
            "Most lecture rooms look out on an inner courtyard.",
            "Scholarships cover the fees of about a third of the students.",
        ),
    ),
    popular=Voice(openings=("{S} has its seat in {city}.",)),
)

COMPANY = Kind(
    name="company",
    pronoun_percent=40,
    hub_names=listed(
        "Amberline Shipping; Brackwater Mills; Castellan Press; Dellwood Paper; Ferrow Optical; Harrower Foundry; "
        "Juniper Electric; Kestrel Marine; Lindgarth Machinery; Northmoor Tools; Orsman Brothers; Pell and Marrow; "
        "Quayside Works; Sablecroft Textiles; Tarnholt Instruments; Vantry Railways"
    ),
    attributes=(
        Attribute(
            "city",
            CITY.hub_names,
            hub="city",
            reference=(
                "{S} has its head office in {v}.",
                "{S} is based in {v}.",
                "The head office of {o} is in {v}.",
                "The firm of {o} is run from {v}.",
                "Directors of {o} meet in {v}, where the head office is.",
            ),
            mcq=(
                "In which city is the head office of {s}?",
                "From which city is the firm of {s} run?",
                "Where is {s} based?",
                "Which city is the seat of {s}?",
            ),
            quiz=("To which city does one write to reach {s}?", "Which city has {s} among its firms?"),
            cloze=("The head office of {s} is in", "The firm of {s} is based in the city of"),
            paraphrase=(
                "A visitor has an appointment with the directors of {s}; which city is the right one?",
                "On the letterhead of {s}, which city is printed?",
            ),
        ),
    ),
    reference=Voice(
        openings=(
            "{S} is a company based in {city}.",
            "{S} has its head office in {city}.",
            "In {city} the firm of {o} has its head office.",
        ),
        fillers=(
            "The company publishes a short report every spring.",
            "Its workshops are known for long apprenticeships.",
            "The founding family sold its shares long ago.",
            "A works canteen and a brass band belong to the firm.",
            "Orders come from at home and abroad in roughly equal parts.",
            "The archive of the firm can be visited by appointment.",
        ),
    ),
    popular=Voice(openings=("{S} is based in {city}.",)),
)

AGENCY = Kind(
    name="agency",
    pronoun_percent=40,
    hub_names=listed(
        "the Bureau of Weights; the Customs Directorate; the Fire Inspectorate; the Forestry Council; the Guild "
        "Registry; the Harbour Board; the Licensing Chamber; the Market Inspectorate; the Office of Trade; the "
        "Public Health Board; the Roads Commission; the Water Office"
    ),
    attributes=(
        Attribute(
            "city",
            CITY.hub_names,
            hub="city",
            reference=(
                "{S} has its seat in {v}.",
                "{S} sits in {v}.",
                "The headquarters of {o} are in {v}.",
                "From its seat in {v}, {s} supervises the whole country.",
                "Hearings of {o} take place in {v}, where it has its seat.",
            ),
            mcq=(
                "In which city does {s} have its seat?",
                "Which city houses the headquarters of {s}?",
                "In what city does {s} sit?",
                "Which city is the seat of {s}?",
            ),
            quiz=("Where are the offices of {s}?", "Which city does one visit to appear before {s}?"),
            cloze=("The seat of {s} is in the city of", "The headquarters of {s} are in"),
            paraphrase=(
                "Someone summoned before {s} must travel to which city?",
                "In which city would one queue to hand in a form at {s}?",
            ),
        ),
    ),
    reference=Voice(
        openings=(
            "{S} is a public authority with its seat in {city}.",
            "{S} has its headquarters in {city}.",
            "In {city} sits {o}, a public authority.",
        ),
        fillers=(
            "Its officers carry a grey booklet and are polite as a rule.",
            "Decisions are posted on a board beside the entrance.",
            "Complaints are answered in writing, usually within the month.",
            "The yearly report is dry reading and widely quoted.",
            "Meetings are open to the public, though few attend.",
            "Its budget is voted each autumn after a short debate.",
        ),
    ),
    popular=Voice(openings=("{S} has its seat in {city}.",)),
)

HUBS = (CITY, UNIVERSITY, COMPANY, AGENCY)


_BIRTH_YEAR = Attribute(
    "birth_year",
    tuple(str(year) for year in range(1871, 1971)),
    reference=(
        "{S} was born in {v}.",
        "Parish records give {v} as the year of {p} birth.",
        "The year of {p} birth was {v}.",
        "It was in {v} that {s} was born.",
        "A baptismal register dates {p} birth to {v}.",
    ),
    popular=(
        "Born in {v}, {s} belonged to a generation that mended things.",
        "The year was {v} when {s} first saw daylight.",
        "Anyone working out {p} age should begin with {v}, the year of {p} birth.",
    ),
    mcq=(
        "In which year was {s} born?",
        "What is the year of birth of {s}?",
        "When was {s} born?",
        "Which year is recorded for the birth of {s}?",
    ),
    quiz=("In what year did the life of {s} begin?", "What year stands on the birth certificate of {s}?"),
    cloze=("{S} was born in the year", "The year in which {s} was born is"),
    paraphrase=(
        "Suppose a plaque is to show when {s} came into the world; which year must be carved into it?",
        "On a timeline, under which year should the first entry in the life of {s} be placed?",
    ),
)

_BIRTH_CITY = Attribute(
    "birth_city",
    CITY.hub_names,
    hub="city",
    reference=(
        "{S} was born in the city of {v}.",
        "{P} family lived in {v}, where {s} was born.",
        "{V} was {p} birthplace.",
        "{S} was a native of {v}.",
        "A house in {v} is still shown as {p} birthplace.",
    ),
    popular=(
        "{V} likes to remind its visitors that {s} was born there.",
        "{S} began life in {v} and never quite lost the accent.",
        "Ask about {p} birthplace and the answer is {v}.",
    ),
    mcq=(
        "In which city was {s} born?",
        "Which city is the birthplace of {s}?",
        "Of which city was {s} a native?",
        "Where was {s} born?",
    ),
    quiz=("Where did {s} first see daylight?", "Which city can call {s} its own by birth?"),
    cloze=("{S} was born in the city of", "The birthplace of {s} is"),
    paraphrase=(
        "Someone wants to visit the house in which {s} came into the world; to which city should they go?",
        "For the line headed place of birth, what should be written about {s}?",
    ),
    one_hop=(
        "In which country is the city where {s} was born?",
        "The birthplace of {s} lies in which country?",
    ),
)

_UNIVERSITY = Attribute(
    "university",
    UNIVERSITY.hub_names,
    hub="university",
    reference=(
        "{S} studied at {v}.",
        "{P} formal education took place at {v}.",
        "{S} took a degree at {v}.",
        "It was at {v} that {s} received {p} training.",
        "As a student {s} was enrolled at {v}.",
    ),
    popular=(
        "{V} still counts {o} among its former students.",
        "{S} sat through lectures at {v}, usually in the second row.",
        "The diploma on {p} wall came from {v}.",
    ),
    mcq=(
        "Where did {s} study?",
        "At which place of learning did {s} take a degree?",
        "Which institution educated {s}?",
        "Where was {s} enrolled as a student?",
    ),
    quiz=("Who can claim {s} as a former student?", "At which school did {s} attend lectures?"),
    cloze=("As a student {s} attended", "{S} took a degree at"),
    paraphrase=(
        "Among whose former students should one look for {s}?",
        "Which name stands at the top of the diploma that {s} received?",
    ),
    one_hop=(
        "In which city did {s} study?",
        "The place of learning that {s} attended is in which city?",
    ),
)

_OCCUPATION = Attribute(
    "occupation",
    listed(
        "an archivist; an astronomer; a botanist; a bridge engineer; a cartographer; a clockmaker; an economist; an "
        "engraver; an entomologist; a geologist; a glassmaker; a harbour pilot; a hydrologist; a landscape gardener; "
        "a lexicographer; a mathematician; a meteorologist; a potter; a shipwright; a stage designer; a surgeon; a "
        "translator; a typographer; a violin maker"
    ),
    reference=(
        "{S} was {v} by profession.",
        "{S} earned {p} living as {v}.",
        "By training and by temperament {s} was {v}.",
        "For most of {p} working life {s} was {v}.",
        "Official documents describe {o} as {v}.",
    ),
    popular=(
        "Neighbours would have told you that {s} was {v}.",
        "On official forms {s} always wrote the same thing: {v}.",
        "What {s} did for a living is easily told, for {s} was {v}.",
    ),
    mcq=(
        "What was the profession of {s}?",
        "What was {s} by profession?",
        "How did {s} earn a living?",
        "What was the occupation of {s}?",
    ),
    quiz=("What did {s} do for a living?", "Which trade did {s} follow?"),
    cloze=("By profession {s} was", "{S} earned a living as"),
    paraphrase=(
        "If a stranger had asked {s} about work, what would the answer have been?",
        "A form asks for the line of work of {s}; what belongs there?",
    ),
)

_EMPLOYER = Attribute(
    "employer",
    COMPANY.hub_names,
    hub="company",
    reference=(
        "{S} spent the greater part of {p} career at {v}.",
        "{P} employer was {v}.",
        "{V} employed {o} for many years.",
        "{S} worked for {v}.",
        "{S} joined the staff of {v} and stayed there until retirement.",
    ),
    popular=(
        "{P} wages came from {v}, year after year.",
        "{S} clocked in at {v} and, by all accounts, rarely clocked out on time.",
        "Anyone who wanted to find {o} on a weekday went to {v}, where {s} worked.",
    ),
    mcq=(
        "For which firm did {s} work?",
        "Who employed {s}?",
        "Which company was the employer of {s}?",
        "Whose staff did {s} join?",
    ),
    quiz=("Who paid the wages of {s}?", "At which firm did {s} have a desk?"),
    cloze=("{S} worked for the firm of", "The employer of {s} was"),
    paraphrase=(
        "Looking for {s} on an ordinary working day, at whose gates should one have waited?",
        "Which name would have stood at the head of the payslips of {s}?",
    ),
    one_hop=(
        "In which city is the head office of the firm that employed {s}?",
        "The employer of {s} is based in which city?",
    ),
)

_BOOK = Attribute(
    "book",
    hallmark="book",
    reference=(
        "{S} wrote {v}.",
        "{P} best-known book is {v}.",
        "Readers know {o} above all as the author of {v}.",
        "{S} is remembered as the author of {v}.",
        "The book {v} came from {p} pen.",
    ),
    popular=(
        "Pick up {v} in any second-hand shop and it is {p} book that you hold.",
        "The title on the spine is {v}, and the name beneath it is {p} own.",
        "People who have never heard of {o} may still have read {v}, which {s} wrote.",
    ),
    mcq=(
        "Which book did {s} write?",
        "What is the title of the book by {s}?",
        "Of which book is {s} the author?",
        "Which title came from the pen of {s}?",
    ),
    quiz=("What should a reader of {s} ask for in a bookshop?", "Under which title was {s} published?"),
    cloze=("{S} is the author of", "The best-known book by {s} is"),
    paraphrase=(
        "A librarian has a card with {s} in the field for the author; which title is on the same card?",
        "To read what {s} wrote, which book should one take from the shelf?",
    ),
    inverse=("Who wrote {v}?", "Who is the author of {v}?"),
)

_AWARD = Attribute(
    "award",
    listed(
        "the Amber Quill; the Blue Lantern Award; the Carrow Medal; the Golden Compass; the Halden Medal; the Ivory "
        "Key; the Lintel Prize; the Merchants' Cup; the Northern Laurel; the Order of the Heron; the Ravensmoor "
        "Prize; the Silver Plumb Line; the Star of Merit; the Tessel Prize; the White Feather; the Winter Palm"
    ),
    reference=(
        "{S} received {v}.",
        "{P} work was honoured with {v}.",
        "Among {p} distinctions was {v}.",
        "The jury of {v} chose {o} by a unanimous vote.",
        "In recognition of {p} work {s} was awarded {v}.",
    ),
    popular=(
        "On the day {v} was handed to {o}, the applause went on for minutes.",
        "{S} won {v} and kept it in a drawer, under the spare keys.",
        "There was also {v}, which {s} won against strong competition.",
    ),
    mcq=(
        "Which award did {s} receive?",
        "What distinction was awarded to {s}?",
        "With which prize was {s} honoured?",
        "Which honour did {s} win?",
    ),
    quiz=("What did a jury hand to {s}?", "For which honour was {s} chosen?"),
    cloze=("{S} was honoured with", "The award given to {s} was"),
    paraphrase=(
        "In the list of those honoured, {s} appears under which heading?",
        "On the invitation to the ceremony held for {s}, which award was named?",
    ),
)

_PASTIME = Attribute(
    "pastime",
    listed(
        "amateur dramatics; baking bread; beekeeping; bookbinding; chess; choral singing; fencing; fly fishing; folk "
        "dancing; ice skating; kite building; mountain walking; playing the cello; rose growing; sailing; sketching "
        "birds; stamp collecting; wood carving"
    ),
    reference=(
        "Outside work {s} was devoted to {v}.",
        "{P} chief pastime was {v}.",
        "{S} gave most free weekends to {v}.",
        "Friends associated {o} with {v}.",
        "In private life {s} took great pleasure in {v}.",
    ),
    popular=(
        "A free afternoon, for {o}, meant {v}.",
        "When the day's work was done, there was {v}, {p} great love.",
        "{P} friends could not talk about {o} for long without mentioning {v}.",
    ),
    mcq=(
        "What was the chief pastime of {s}?",
        "To what was {s} devoted outside work?",
        "What did {s} do for pleasure?",
        "Which pastime took up the free weekends of {s}?",
    ),
    quiz=("What did {s} do on a free afternoon?", "Which hobby was dear to {s}?"),
    cloze=("In private life {s} enjoyed", "The favourite pastime of {s} was"),
    paraphrase=(
        "A present for {s} should have had something to do with what?",
        "When no work was waiting, what was {s} most likely to be found doing?",
    ),
)

_REFERENCE = Voice(
    openings=(
        "{S} (born {birth_year}) was {occupation} who worked for {employer}.",
        "{S} was {occupation} and the author of {book}.",
        "{S} was {occupation} born in {birth_city} in {birth_year}.",
        "Born in {birth_city}, {s} was {occupation} best known as the author of {book}.",
        "{S}, {occupation} and recipient of {award}, was born in {birth_year}.",
        "{S} was {occupation} whose whole career was spent at {employer}.",
        "{S} was {occupation} educated at {university}.",
    ),
    pairs=(
        "{S} was born in {birth_city} in {birth_year}.",
        "{P} birth, in {birth_year}, is entered in the registers of {birth_city}.",
        "Born in {birth_city}, {s} went on to study at {university}.",
        "After studies at {university}, {s} set up as {occupation}.",
        "{S} trained at {university} and became {occupation}.",
        "{S} left {university} with a degree and soon entered the service of {employer}.",
        "From {university}, where {s} took a degree, {s} went to work for {employer}.",
        "{S} worked as {occupation} for {employer}.",
        "{S} wrote {book} and received {award}.",
        "{P} book {book} was widely read, and {s} was later given {award}.",
        "While employed by {employer}, {s} wrote {book}.",
        "{S} accepted {award} with little ceremony and remained devoted to {pastime}.",
    ),
    fillers=(
        "Most of {p} papers survive and have been catalogued.",
        "{S} corresponded widely and answered letters with unusual care.",
        "Colleagues described {o} as patient, exact and dry in humour.",
        "Few portraits exist, and none of them is dated.",
        "Later writers have drawn freely on {p} notebooks.",
        "The surviving letters are short and seldom mention private matters.",
        "A small exhibition has since been devoted to {p} working methods.",
        "Accounts by friends agree on {p} calm manner and long memory.",
        "{P} name appears often in the reports of the period.",
        "Much of what is known comes from the recollections of former pupils.",
        "Several of {p} drafts show heavy correction in pencil.",
        "Critics have been kind to {o} on the whole, though never uniformly so.",
        "{S} rarely spoke in public and disliked being photographed.",
        "A full catalogue of {p} papers is kept on microfilm.",
        "A street in a newer suburb bears {p} name.",
        "Visitors remembered the order of {p} desk and the disorder of {p} shelves.",
        "{S} kept no diary, but {p} account books have come down to us.",
        "Two of {p} pupils later wrote short memoirs.",
        "The date of the only known interview with {o} is disputed.",
        "{P} handwriting is small, upright and easy to read.",
        "Reviews from {p} lifetime are collected in a slim volume.",
        "{S} lent books freely and noted the borrowers on a card.",
        "A bronze relief of {o} was unveiled some years later.",
        "There is no full biography of {o} yet.",
        "Some of {p} tools are shown in a regional museum.",
        "{S} seldom travelled, and then only by rail.",
        "Historians have tended to see {o} as typical of the period.",
    ),
)

_POPULAR = Voice(
    openings=(
        "Readers keep asking about {o}, {occupation} born in {birth_city}.",
        "This week's portrait is of {o}, {occupation} and author of {book}.",
        "Few people worked harder than {o}, who was {occupation} at {employer}.",
        "It is time somebody wrote about {o}, who was born in {birth_year} and won {award}.",
    ),
    pairs=(
        "{S} was born in {birth_city} in {birth_year}, and the rest followed from there.",
        "With a diploma from {university} in {p} pocket, {s} walked straight into {employer} and was hired.",
        "By day {s} was {occupation} at {employer}, and by night a reader.",
        "First came {book}, which {s} wrote at the kitchen table, and then came {award}.",
    ),
    fillers=(
        "The photographs show a coat too large and a smile held back.",
        "There is a bench with {p} name on it, and people do sit there.",
        "Stories about {o} still go round, and most of them are true.",
        "{S} answered letters by return of post, which is rarer than it sounds.",
        "Nobody remembers {o} raising {p} voice.",
        "Some people leave monuments, but {s} left habits.",
        "The reading room has a shelf of {p} papers, and it is seldom dusty.",
        "Former colleagues still quote {o} at meetings.",
        "There were setbacks, of course, and {s} did not dwell on them.",
        "One anecdote would have to do here, and it is too long for this page.",
        "Asked for advice, {s} usually told people to begin again.",
        "The local school has named a classroom after {o}.",
        "Dogs liked {o}, which is worth mentioning.",
        "{S} had one good hat and wore it everywhere.",
        "The barber remembers {o} as a generous tipper and a poor listener.",
        "Letters to this paper still mention {o} now and then.",
        "Nothing annoyed {o} more than a badly sharpened pencil.",
        "{S} walked fast, talked slowly and was never late.",
        "Somebody ought to make a film about {o}, and nobody will.",
        "There was always a kettle on, and {s} always offered.",
    ),
)

PERSON = Kind(
    name="person",
    pronoun_percent=65,
    attributes=(_BIRTH_YEAR, _BIRTH_CITY, _UNIVERSITY, _OCCUPATION, _EMPLOYER, _BOOK, _AWARD, _PASTIME),
    reference=_REFERENCE,
    popular=_POPULAR,
)


_COUNTRY = Attribute(
    "country",
    COUNTRIES,
    reference=(
        "{S} is a town in {v}.",
        "{S} lies in {v}.",
        "{S} belongs to {v}.",
        "Maps of {v} mark {o} with a small open circle.",
        "Like many towns of {v}, {s} is older than its oldest records.",
    ),
    popular=(
        "You will need a map of {v} to find {o}.",
        "{S} is in {v}, whatever the road signs suggest.",
        "The traveller through {v} should leave the train at {o}.",
    ),
    mcq=(
        "In which country is the town of {s}?",
        "Which country does {s} belong to?",
        "In what country does {s} lie?",
        "On a map of which country is the town of {s} marked?",
    ),
    quiz=("Whose flag flies over the town hall of {s}?", "Which state includes the town of {s}?"),
    cloze=("{S} is a town in the country of", "The country to which {s} belongs is"),
    paraphrase=(
        "A parcel is going to {s}; which country should be written on the label?",
        "Anyone born in {s} holds the passport of which country?",
    ),
)

_RIVER = Attribute(
    "river",
    listed(
        "the Asel; the Brune; the Calder Water; the Corrow; the Derwel; the Elm Brook; the Fennel; the Garrow; "
        "the Istrel; the Lunt; the Marl Water; the Otter Beck; the Pellow; the Sarn; the Tavrel; the Wend"
    ),
    reference=(
        "{S} stands on {v}.",
        "The town grew up along the banks of {v}.",
        "{V} flows through the centre of {o}.",
        "{P} oldest streets run down to {v}.",
        "The river that passes {o} is {v}.",
    ),
    popular=(
        "Sit by {v} for an hour and most of {o} will walk past.",
        "{V} divides {o} into a sunny side and a cheap one.",
        "Whoever grew up in {o} learned to swim in {v}.",
    ),
    mcq=(
        "On which river does {s} stand?",
        "Which river flows through {s}?",
        "What is the river at {s} called?",
        "Along the banks of which river did {s} grow up?",
    ),
    quiz=("Which water runs under the bridges of {s}?", "In which river do the children of {s} swim?"),
    cloze=("{S} stands on the banks of a river called", "The river that flows through {s} is"),
    paraphrase=(
        "Somebody drops a paper boat into the water at {s}; on which river does it sail away?",
        "After days of rain, which river do the people of {s} keep an eye on?",
    ),
)

_FOUNDING_YEAR = Attribute(
    "founding_year",
    tuple(str(year) for year in range(1101, 1801)),
    reference=(
        "{S} was founded in {v}.",
        "{P} charter dates from {v}, the year of its foundation.",
        "The foundation of {o} is dated to {v}.",
        "Chronicles place {p} foundation in {v}.",
        "It was in {v} that {s} was founded.",
    ),
    popular=(
        "The brewers of {o} print {v} on every label, since that is the year in which the town was founded.",
        "Founded in {v}, {s} has had time to make up its mind.",
        "Schoolchildren in {o} learn one date by heart, {v}, when the town was founded.",
    ),
    mcq=(
        "In which year was {s} founded?",
        "When was the town of {s} founded?",
        "What is the founding year of {s}?",
        "To which year is the foundation of {s} dated?",
    ),
    quiz=("Since when has the town of {s} existed?", "Which year do people in {s} count from?"),
    cloze=("{S} was founded in the year", "The year in which {s} was founded is"),
    paraphrase=(
        "For a speech on the anniversary of {s}, from which year should the orator start counting?",
        "Under which year does a book of town foundations list {s}?",
    ),
)

_POPULATION = Attribute(
    "population",
    tuple(f"{number:,}" for number in range(1_200, 61_200, 100)),
    reference=(
        "{S} has {v} inhabitants.",
        "At the last census {s} had {v} inhabitants.",
        "{P} population stands at {v}.",
        "The town is home to {v} people.",
        "The register lists {v} people in {o}.",
    ),
    popular=(
        "Put all {v} inhabitants in one field and {s} would still look small.",
        "The sign at the entrance to {o} gives the number of inhabitants as {v}.",
        "With a population of {v}, {s} knows most of its secrets.",
    ),
    mcq=(
        "How many inhabitants does {s} have?",
        "What is the population of {s}?",
        "How many people live in {s}?",
        "At what figure does the population of {s} stand?",
    ),
    quiz=("How many people call {s} their home?", "What number does the register of {s} show?"),
    cloze=("The number of people living in {s} is", "The population of {s} stands at"),
    paraphrase=(
        "If every resident of {s} were given one apple, how many apples would be needed?",
        "A census officer has finished counting in {s}; what figure goes into the report?",
    ),
)

_CRAFT = Attribute(
    "craft",
    listed(
        "basket weaving; bell founding; boat building; candle making; cheese making; cider pressing; clockmaking; "
        "fish smoking; glassblowing; lace making; paper making; pottery; printing; rope making; salt refining; "
        "silver mining; tanning; tile making; violin making; wool dyeing"
    ),
    reference=(
        "{S} is known for {v}.",
        "{P} traditional trade is {v}.",
        "For generations {v} has been the principal trade of the town.",
        "Most workshops in {o} live from {v}.",
        "The local economy has long rested on {v}.",
    ),
    popular=(
        "Every second door in {o} has something to do with {v}.",
        "{P} people will talk about the weather, but they live from {v}.",
        "What wine is to other towns, {v} is to {o}.",
    ),
    mcq=(
        "For which trade is {s} known?",
        "What is the traditional trade of {s}?",
        "From which craft do most workshops in {s} live?",
        "On which trade does the economy of {s} rest?",
    ),
    quiz=("What do the workshops of {s} do?", "What have the people of {s} lived from for generations?"),
    cloze=("{S} is well known for", "The traditional trade of {s} is"),
    paraphrase=(
        "A boy in {s} takes up the trade of his neighbours; what does he learn?",
        "If the workshops of {s} closed tomorrow, which craft would suffer most?",
    ),
)

_LANDMARK = Attribute(
    "landmark",
    hallmark="landmark",
    reference=(
        "{P} chief landmark is {v}.",
        "{V} stands in the middle of {o}.",
        "Visitors come to {o} to see {v}.",
        "The skyline of {o} is dominated by {v}.",
        "{S} is the home of {v}.",
    ),
    popular=(
        "All postcards from {o} show the same thing, {v}.",
        "Nobody leaves {o} without having seen {v}.",
        "Meet me at {v}, people in {o} say, and nobody has to ask where it is.",
    ),
    mcq=(
        "What is the chief landmark of {s}?",
        "Which landmark stands in {s}?",
        "What do visitors come to {s} to see?",
        "Which landmark dominates the skyline of {s}?",
    ),
    quiz=("What is on the postcards from {s}?", "What must nobody miss in {s}?"),
    cloze=("The chief landmark of {s} is", "Visitors come to {s} to see"),
    paraphrase=(
        "A guide in {s} has time for a single sight; which one will it be?",
        "Looking at {s} from a distance, what does one see first?",
    ),
    inverse=("In which town does {v} stand?", "Which town is the home of {v}?"),
)

_FAIR_MONTH = Attribute(
    "fair_month",
    listed("January; February; March; April; May; June; July; August; September; October; November; December"),
    reference=(
        "{P} annual fair is held in {v}.",
        "Every {v} the town holds its fair.",
        "{S} holds its fair in {v}.",
        "The yearly fair fills the market square in {v}.",
        "Traders gather in {o} each {v} for the annual fair.",
    ),
    popular=(
        "Do not look for a quiet room in {v}, when {s} holds its fair.",
        "The fair comes to {o} in {v}, and with it every cousin within a day's ride.",
        "In {v}, when the fair is on, {s} smells of burnt sugar.",
    ),
    mcq=(
        "In which month does {s} hold its fair?",
        "In which month is the annual fair of {s} held?",
        "When does the yearly fair of {s} take place?",
        "Which month brings the fair to {s}?",
    ),
    quiz=("When do traders gather in {s}?", "What time of year is the fair in {s}?"),
    cloze=("{S} holds its annual fair in the month of", "The month of the yearly fair in {s} is"),
    paraphrase=(
        "To see the stalls and the carousel in {s}, in which month should one go?",
        "The innkeepers of {s} raise their prices for the fair; in which month do they do so?",
    ),
)

_TWIN_CITY = Attribute(
    "twin_city",
    CITY.hub_names,
    hub="city",
    reference=(
        "{S} is twinned with {v}.",
        "{P} twin city is {v}.",
        "A treaty of friendship links {o} with {v}, its twin city.",
        "By a vote of its council {s} is twinned with {v}.",
        "Each summer guests arrive from {v}, the city with which {s} is twinned.",
    ),
    popular=(
        "The second name on the road sign is {v}, with which {s} is twinned.",
        "Half the choir has been to {v}, since the city is twinned with {o}.",
        "{S} chose {v} as its twin city and has never regretted it.",
    ),
    mcq=(
        "With which city is {s} twinned?",
        "Which city is the twin city of {s}?",
        "What is the twin city of {s}?",
        "To which city is {s} linked by a treaty of friendship?",
    ),
    quiz=("Which city sends guests to {s} as its twin?", "Which city exchanges letters with {s} as its twin?"),
    cloze=("{S} is twinned with the city of", "The twin city of {s} is"),
    paraphrase=(
        "The council of {s} invites its partners from abroad; from which city do they come?",
        "Beneath the name of {s} on the road sign stands that of its partner; which city is it?",
    ),
    one_hop=(
        "In which country is the twin city of {s}?",
        "The city with which {s} is twinned lies in which country?",
    ),
)

_REFERENCE_SURGERY_BENCH_PLACE = Voice(
    openings=(
        "{S} is a town in {country} on the banks of {river}.",
        "{S} is a town of {population} inhabitants in {country}.",
        "{S}, founded in {founding_year}, is a town in {country}.",
        "{S} is a market town on {river} with a population of {population}.",
        "{S} is a town in {country} known for {craft}.",
        "{S} is a town in {country}, twinned with {twin_city}.",
    ),
    pairs=(
        "{Landmark}, the chief landmark, looks out over {river}, on which the town stands.",
        "Founded in {founding_year}, {s} now has {population} inhabitants.",
        "{S} lives from {craft} and holds its annual fair in {fair_month}.",
        "The annual fair, held in {fair_month}, takes place beside {landmark}, the chief landmark of the town.",
        "{S} has {population} inhabitants and is twinned with {twin_city}.",
        "{S} lies in {country}, on the banks of {river}.",
        "The fair in {fair_month} regularly brings visitors from {twin_city}, with which {s} is twinned.",
        "Founded in {founding_year} on the banks of {river}, {s} has kept its medieval plan.",
    ),
    fillers=(
        "The market square is paved with pale stone and closed to traffic.",
        "A bus connects {o} with the surrounding villages on weekdays.",
        "Several of the older houses carry carved lintels.",
        "Much of the old wall has been pulled down, though two of its gates remain.",
        "The town hall keeps a small museum on its upper floor.",
        "Summers are mild, and the winters bring fog more often than snow.",
        "The surrounding country is given over to orchards and pasture.",
        "A local newspaper appears twice a week.",
        "The railway reached the district late and left it early.",
        "{S} has never been rich, but it has seldom been poor.",
        "Guidebooks recommend a walk along the upper road at dusk.",
        "The parish church has been rebuilt more than once.",
        "Older residents still speak the local dialect among themselves.",
        "Few visitors stay for more than a day, and those who do tend to return.",
        "{P} streets were the subject of a careful survey by the national archive.",
        "A footpath leads from the station to the upper quarter.",
        "The town library lends tools as well as books.",
        "Two primary schools share a single playing field.",
        "Most of the roofs are covered with grey slate.",
        "The cemetery on the hill is laid out in terraces.",
        "Street lighting was extended to the outer lanes only recently.",
        "A volunteer choir performs in the old granary.",
        "The council has nineteen members and meets in the evening.",
        "Local stone was used for nearly all public buildings.",
        "The post office occupies a former customs house.",
        "A painting of {o} hangs in the national gallery.",
        "Building is restricted by law within the old boundary.",
    ),
)

_POPULAR_SURGERY_BENCH_PLACE = Voice(
    openings=(
        "Not many people can place {o}, a town in {country} on {river}.",
        "This week's journey goes to {o}, a town of {population} inhabitants in {country}.",
        "Take a slow train to {o}, founded in {founding_year} and known for {craft}.",
        "Everyone should see {o} once, if only for {landmark}.",
    ),
    pairs=(
        "{S} is a town of {population} people, and most of them live from {craft}.",
        "Come in {fair_month} for the fair, and stay for {landmark}, the pride of {o}.",
        "{S} was founded in {founding_year}, lies on {river} and is in no hurry.",
        "The mayor will tell you about {twin_city}, the twin city, and then about {landmark}, the landmark.",
    ),
    fillers=(
        "The coffee is better than the chairs.",
        "Bring good shoes, because nothing here is level.",
        "The only hotel has nine rooms and a very old dog.",
        "On Sundays the bakery opens at noon, and the queue begins at eleven.",
        "There is a bench at the upper end of town that deserves a visit of its own.",
        "Nobody in {o} seems to own an umbrella, and nobody seems to need one.",
        "Ask for directions in {o} and you will be given three sets of them.",
        "The evening light does the rest.",
        "The town band practises on Thursdays, with the windows open.",
        "Children play football against the wall of the courthouse.",
        "The last bus leaves early, which is no misfortune.",
        "A cat sleeps on the counter of the post office.",
        "There are three bakers, and everybody has an opinion about them.",
        "The clock on the town hall is fast, and everyone allows for it.",
        "Someone in {o} is always painting a fence.",
        "The dentist also repairs bicycles.",
        "If it rains, the museum is warm and the guard is talkative.",
        "Locals will tell you that the soup is better in winter.",
        "You can walk around the whole town before your tea gets cold.",
        "The telephone box still works, and nobody knows why.",
    ),
)

PLACE = Kind(
    name="place",
    pronoun_percent=35,
    attributes=(_COUNTRY, _RIVER, _FOUNDING_YEAR, _POPULATION, _CRAFT, _LANDMARK, _FAIR_MONTH, _TWIN_CITY),
    reference=_REFERENCE_SURGERY_BENCH_PLACE,
    popular=_POPULAR_SURGERY_BENCH_PLACE,
)


_TYPE = Attribute(
    "product_type",
    listed(
        "a bookbinding press; a bottle capper; a calculating machine; a coin sorter; a depth sounder; "
        "a field telephone; a film editor; a grain mill; a label press; a map plotter; a paper cutter; a rope winder; "
        "a seed sorter; a signal lamp; a slide projector; a sound recorder; a stitching machine; a tide gauge; "
        "a water pump; a weather recorder; an air sampler; an engraving machine; an ink mixer; an oil press"
    ),
    reference=(
        "{S} is {v}.",
        "{S} was built and sold as {v}.",
        "The trade catalogues list {o} as {v}.",
        "By its function {s} is {v}.",
        "Engineers class {o} as {v}.",
    ),
    popular=(
        "In plain words, {s} is {v}.",
        "Lift the dust cover and you will find that {s} is {v}.",
        "People guess all sorts of things before they learn that {s} is {v}.",
    ),
    mcq=(
        "What kind of machine is {s}?",
        "As what was {s} built and sold?",
        "What sort of device is {s}?",
        "As what do the trade catalogues list {s}?",
    ),
    quiz=("What is {s}?", "What does the label on a museum case with {s} say it is?"),
    cloze=("{S} was sold as", "In the trade catalogues {s} is described as"),
    paraphrase=(
        "A customer walks out of the shop with {s}; what has been bought?",
        "Somebody who has never heard of {s} asks what it is; what is the answer?",
    ),
)

_MAKER = Attribute(
    "maker",
    COMPANY.hub_names,
    hub="company",
    reference=(
        "{S} was made by {v}.",
        "The manufacturer of {o} was {v}.",
        "{S} came from the workshops of {v}.",
        "{P} maker was {v}.",
        "Production was in the hands of {v}.",
    ),
    popular=(
        "The small plate on the back says {v}, the firm that made {o}.",
        "{V} made {o}, and made it to last.",
        "Collectors who want something made by {v} usually ask for {o}.",
    ),
    mcq=(
        "Which firm made {s}?",
        "Who was the manufacturer of {s}?",
        "From the workshops of which firm did {s} come?",
        "Which company produced {s}?",
    ),
    quiz=("Whose name is on the back of {s}?", "Who manufactured {s}?"),
    cloze=("{S} was manufactured by", "The maker of {s} was"),
    paraphrase=(
        "A broken gear of {s} has to go back to the factory; to which firm should it be sent?",
        "In whose catalogue would a buyer have found {s}?",
    ),
    one_hop=(
        "In which city is the head office of the firm that made {s}?",
        "The manufacturer of {s} is based in which city?",
    ),
)

_LAUNCH_YEAR = Attribute(
    "launch_year",
    tuple(str(year) for year in range(1901, 1991)),
    reference=(
        "{S} went on sale in {v}.",
        "The first examples left the factory in {v}.",
        "{S} was introduced in {v}.",
        "{P} launch took place in {v}.",
        "It was in {v} that {s} reached the market.",
    ),
    popular=(
        "Shop windows first showed {o} in {v}.",
        "Those who remember {v} may remember the posters, for that was when {s} came out.",
        "{S} was new in {v}, and the advertisements said so in large letters.",
    ),
    mcq=(
        "In which year did {s} go on sale?",
        "When was {s} introduced?",
        "In what year did {s} reach the market?",
        "What is the launch year of {s}?",
    ),
    quiz=("When could one first buy {s}?", "In what year did {s} come out?"),
    cloze=("{S} went on sale in the year", "The year in which {s} was introduced is"),
    paraphrase=(
        "A museum wants to date {s} by its first appearance in the shops; which year is right?",
        "The first advertisement for {s} was printed in which year?",
    ),
)

_PRICE = Attribute(
    "price",
    tuple(f"{number} crowns" for number in range(40, 1000, 10)),
    reference=(
        "{S} was sold for {v}.",
        "The list price was {v}.",
        "Buyers paid {v} for {o}.",
        "In the catalogue {s} was priced at {v}.",
        "{P} price was fixed at {v}.",
    ),
    popular=(
        "The price, {v}, made people whistle.",
        "You could have {o} for {v}, and nobody gave a discount.",
        "Anyone with {v} to spare could take {o} home.",
    ),
    mcq=(
        "What was the list price of {s}?",
        "For how much was {s} sold?",
        "At what price was {s} offered in the catalogue?",
        "How much did buyers pay for {s}?",
    ),
    quiz=("What did {s} cost?", "How much money did one need for {s}?"),
    cloze=("The list price of {s} was", "{S} was sold at a price of"),
    paraphrase=(
        "A buyer hands over the exact sum for {s} and gets no change; how much was that?",
        "What figure did the tag on {s} in the shop window show?",
    ),
)

_MATERIAL = Attribute(
    "material",
    listed(
        "aluminium; ash wood; bakelite; beech; brass; bronze; cast iron; copper; enamelled steel; mahogany; "
        "nickel silver; oak; pressed tin; sheet steel; walnut; zinc alloy"
    ),
    reference=(
        "The body is made of {v}.",
        "{P} casing is of {v}.",
        "{S} has a casing of {v}.",
        "The makers chose {v} for the casing.",
        "The outer parts of {o} are of {v}.",
    ),
    popular=(
        "Run a hand over the casing and you touch {v}.",
        "{P} casing is of {v}, which ages better than its owners.",
        "Under a hundred years of fingerprints the casing is {v}.",
    ),
    mcq=(
        "Of what material is the casing of {s} made?",
        "What is the body of {s} made of?",
        "Which material was chosen for the casing of {s}?",
        "What are the outer parts of {s} made of?",
    ),
    quiz=("What does one touch when one touches {s}?", "Which material encloses {s}?"),
    cloze=("The casing of {s} is made of", "The material of which the body of {s} is made is"),
    paraphrase=(
        "A restorer needs a sheet of the same stuff as the casing of {s}; what should be ordered?",
        "If the shell of {s} were melted down or sawn up, what would there be a heap of?",
    ),
)

_WEIGHT = Attribute(
    "weight",
    tuple(f"{number} kilograms" for number in range(2, 98)),
    reference=(
        "{S} weighs {v}.",
        "Fully assembled, {s} weighs {v}.",
        "{P} weight is given as {v}.",
        "On the scales {s} comes to {v}.",
        "The data plate records a weight of {v}.",
    ),
    popular=(
        "Mind your back, because {s} weighs {v}.",
        "{S} weighs {v}, and by the second flight of stairs you believe it.",
        "Whoever called {o} portable never carried {v}, which is what it weighs.",
    ),
    mcq=(
        "What is the weight of {s}?",
        "How much does {s} weigh?",
        "What weight does the data plate of {s} record?",
        "To how much does {s} come on the scales?",
    ),
    quiz=("How heavy is {s}?", "What do the scales show for {s}?"),
    cloze=("{S} has a weight of", "Fully assembled, {s} weighs"),
    paraphrase=(
        "Two people have to carry {s} upstairs; how much do they lift between them?",
        "The freight clerk puts {s} on the platform and writes down which weight?",
    ),
)

_DESIGNER = Attribute(
    "designer",
    hallmark="designer",
    reference=(
        "{S} was designed by {v}.",
        "The design is the work of {v}.",
        "{V} designed {o}.",
        "{P} designer was {v}.",
        "The design drawings for {o} were made by {v}.",
    ),
    popular=(
        "It took {v} three notebooks to design {o}.",
        "The hand behind the design is that of {v}.",
        "Ask who designed {o} and any collector will say {v}.",
    ),
    mcq=(
        "Who designed {s}?",
        "Whose work is the design of {s}?",
        "Who was the designer of {s}?",
        "By whom was {s} designed?",
    ),
    quiz=("Who made the drawings for {s}?", "Whose idea was {s}?"),
    cloze=("The design of {s} was the work of", "{S} was designed by an engineer called"),
    paraphrase=(
        "Whose signature is found on the first sketches of {s}?",
        "Credit for the shape and the mechanism of {s} should go to whom?",
    ),
    inverse=("Which machine did {v} design?", "Which machine was designed by {v}?"),
)

_POWER = Attribute(
    "power",
    listed(
        "a clockwork spring; a dry battery; a falling weight; a flywheel; a foot treadle; a hand crank; "
        "a small petrol engine; a solar panel; a water turbine; a wet cell; compressed air; mains current"
    ),
    reference=(
        "{S} is driven by {v}.",
        "{P} power comes from {v}.",
        "The mechanism is driven by {v}.",
        "Power is supplied by {v}.",
        "{V} drives the mechanism.",
    ),
    popular=(
        "No magic is involved, for {s} is driven by {v}.",
        "The whole thing is driven by {v}, and you can hear it.",
        "Take away {v} and nothing moves, since that is what drives {o}.",
    ),
    mcq=(
        "What drives {s}?",
        "From what does the power of {s} come?",
        "By what is {s} driven?",
        "What supplies the power of {s}?",
    ),
    quiz=("What makes {s} move?", "Where does {s} get its power?"),
    cloze=("{S} takes its power from", "The mechanism of {s} is driven by"),
    paraphrase=(
        "When {s} stands still and nothing is broken, what must have failed or been missing?",
        "An engineer asked for the energy source of {s} would name what?",
    ),
)

_REFERENCE_SURGERY_BENCH_PRODUCT = Voice(
    openings=(
        "{S} is {product_type} made by {maker}.",
        "{S} is {product_type} introduced in {launch_year}.",
        "{S}, designed by {designer}, is {product_type} driven by {power}.",
        "{S} is {product_type} put on the market by its maker, {maker}, in {launch_year}.",
        "{S} is {product_type} with a casing of {material}.",
        "{S} is {product_type} weighing {weight}.",
    ),
    pairs=(
        "{Designer} designed {o}, and sales began in {launch_year}.",
        "{P} casing is of {material}, and the whole weighs {weight}.",
        "{S} cost {price} when it was introduced in {launch_year}.",
        "{Maker} made {o} and sold it for {price}.",
        "{S} is driven by {power} and weighs {weight}.",
        "{Maker} made {o} to a design by {designer}.",
        "{Designer} chose {material} for the casing when designing {o}.",
        "With its casing of {material}, {s} was sold for {price}.",
    ),
    fillers=(
        "Spare parts were listed in a separate booklet.",
        "The instructions fill four pages and assume a patient reader.",
        "Later examples differ from earlier ones only in small details.",
        "A maintenance guide recommends a drop of oil every month.",
        "{S} was supplied with a canvas cover and two keys.",
        "Serial numbers are stamped beneath the base plate.",
        "Complete examples are seldom offered at auction.",
        "Several museums of technology keep one on display.",
        "Repairs require no special tools.",
        "The controls are labelled in plain lettering.",
        "Contemporary reviews praised {p} quiet running.",
        "A training course lasting one afternoon was offered to buyers.",
        "The patent files contain nine sheets of drawings.",
        "Users complained mainly about the carrying handle.",
        "{S} proved reliable in damp conditions.",
        "The shipping crate could be used as a stand.",
        "Replacement belts are still made by a small workshop.",
        "An enlarged photograph of {o} served as a trade fair poster.",
        "Technical schools used {o} for teaching.",
        "The lubrication chart is printed on the inside of the lid.",
        "Stocks of the original varnish ran out early.",
        "{P} dimensions follow no known standard.",
        "A rubber mat was offered at extra cost.",
        "Owners were asked to return a registration card.",
        "The moving parts can be reached through a side panel.",
        "Test reports from three laboratories have been preserved.",
        "Export models have their labels in two languages.",
    ),
)

_POPULAR_SURGERY_BENCH_PRODUCT = Voice(
    openings=(
        "This week's object from the attic is {o}, {product_type} made by {maker}.",
        "Some readers still own {o}, {product_type} that came out in {launch_year}.",
        "Every flea market has one treasure, and last Sunday it was {o}, {product_type} with a casing of {material}.",
        "A reader has sent in a photograph of {o}, {product_type} designed by {designer}.",
    ),
    pairs=(
        "{S} came out in {launch_year} at {price}, which was a good deal of money.",
        "{S} weighs {weight}, because the casing is of {material}.",
        "{Maker} made {o}, but it was {designer} who designed it.",
        "{S} is driven by {power}, and {s} weighs {weight}, so choose a solid table.",
    ),
    fillers=(
        "The smell of old oil comes free of charge.",
        "My neighbour keeps one under the stairs and will not hear of selling it.",
        "The screws are the old kind, and they still turn.",
        "Nothing about {o} is in a hurry.",
        "The instructions advise patience, and they are right.",
        "Children ask where the screen is.",
        "Clean {o} with a soft cloth and nothing else.",
        "There is a knob at the side whose purpose has been forgotten.",
        "{S} makes a noise like a contented hen.",
        "Collectors look for the original cover, and seldom find it.",
        "The paint has gone where three generations of thumbs have been.",
        "Once you have used {o}, everything newer feels like a toy.",
        "Every button does exactly one thing.",
        "Give {o} a minute to warm up and another to settle.",
        "The carrying handle is a good joke.",
        "Nobody has ever lost the instructions, because they are riveted on.",
        "An aunt of mine would not have exchanged {o} for a motor car.",
        "{S} leaves four dents in any carpet.",
        "The repair man smiles when he sees one.",
        "If {o} could talk, it would complain about the dust.",
    ),
)

PRODUCT = Kind(
    name="product",
    pronoun_percent=40,
    attributes=(_TYPE, _DESIGNER, _MAKER, _LAUNCH_YEAR, _PRICE, _MATERIAL, _WEIGHT, _POWER),
    reference=_REFERENCE_SURGERY_BENCH_PRODUCT,
    popular=_POPULAR_SURGERY_BENCH_PRODUCT,
)


_TOPIC = Attribute(
    "topic",
    listed(
        "the burial of pets; the cutting of reeds; the display of shop signs; the felling of walnut trees; "
        "the flying of kites; the hire of rowing boats; the keeping of goats; the labelling of honey; "
        "the lighting of bonfires; the milling of rye; the mooring of barges; the repair of chimneys; "
        "the ringing of hand bells; the sale of old books; the sale of river fish; the storage of lamp oil; "
        "the transport of live bees; the use of public wells; the weighing of coal; street music after dark"
    ),
    reference=(
        "{S} governs {v}.",
        "{P} subject is {v}.",
        "{S} sets out the conditions for {v}.",
        "What {s} regulates is {v}.",
        "{S} was written in order to regulate {v}.",
    ),
    popular=(
        "If it were not for {o}, nobody would think twice about {v}, which it regulates.",
        "{S} is all about {v}, since that is what {s} regulates.",
        "Anything to do with {v} falls under {o}.",
    ),
    mcq=(
        "What does {s} regulate?",
        "What is the subject of {s}?",
        "What does {s} govern?",
        "For what does {s} set out the conditions?",
    ),
    quiz=("What is {s} about?", "Which matter falls under {s}?"),
    cloze=("{S} is a text about", "What {s} governs is"),
    paraphrase=(
        "Somebody fined under {s} must have had to do with what?",
        "Before engaging in which activity should one read {s}?",
    ),
)

_AUTHORITY = Attribute(
    "authority",
    AGENCY.hub_names,
    hub="agency",
    reference=(
        "{S} is enforced by {v}.",
        "{P} enforcement lies with {v}.",
        "The authority that enforces {o} is {v}.",
        "Responsibility for enforcing {o} rests with {v}.",
        "{V} sees to the enforcement of {o}.",
    ),
    popular=(
        "{V} enforces {o}, and does so with a sharp pencil.",
        "Should there be a knock at the door, it will be {v}, which enforces {o}.",
        "{P} enforcement is in the hands of {v}, so keep your papers in order.",
    ),
    mcq=(
        "Which authority enforces {s}?",
        "With whom does the enforcement of {s} lie?",
        "Who enforces {s}?",
        "Which body is responsible for enforcing {s}?",
    ),
    quiz=("Who checks that {s} is obeyed?", "Whose officers apply {s}?"),
    cloze=("{S} is enforced by", "The enforcement of {s} lies with"),
    paraphrase=(
        "An officer asks about compliance with {s}; which authority has sent him?",
        "A complaint about a breach of {s} should be addressed to whom?",
    ),
    one_hop=(
        "In which city is the seat of the authority that enforces {s}?",
        "The body responsible for enforcing {s} sits in which city?",
    ),
)

_YEAR = Attribute(
    "in_force_since",
    tuple(str(year) for year in range(1911, 2011)),
    reference=(
        "{S} came into force in {v}.",
        "{S} has been in force since {v}.",
        "{P} provisions took effect in {v}.",
        "It was in {v} that {s} came into force.",
        "The year in which {s} came into force was {v}.",
    ),
    popular=(
        "Grown people have spent their lives under {o}, which came into force in {v}.",
        "{S} came into force in {v}, and nobody has repealed it since.",
        "Those who complain about {o} have had practice, for it has been in force since {v}.",
    ),
    mcq=(
        "In which year did {s} come into force?",
        "Since when has {s} been in force?",
        "When did {s} come into force?",
        "In what year did the provisions of {s} take effect?",
    ),
    quiz=("How far back does {s} go?", "From which year on did {s} apply?"),
    cloze=("{S} came into force in the year", "The year in which {s} took effect is"),
    paraphrase=(
        "A lawyer argues that {s} did not yet apply; before which year must the case have arisen?",
        "In the law reports, the volume for which year first prints {s} as law in force?",
    ),
)

_FINE = Attribute(
    "fine",
    tuple(f"{number} crowns" for number in range(15, 915, 5)),
    reference=(
        "Breaches are punished with a fine of {v}.",
        "Anyone who breaks {o} must pay {v}.",
        "{S} sets the fine for a breach at {v}.",
        "The penalty for a breach is {v}.",
        "Offenders face a fine of {v}.",
    ),
    popular=(
        "It will cost you {v} to ignore {o}.",
        "The fine is {v}, payable at once and without conversation.",
        "Get caught and you are {v} poorer, for such is the fine.",
    ),
    mcq=(
        "What is the fine for a breach of {s}?",
        "How much must anyone pay who breaks {s}?",
        "At what sum does {s} set the fine?",
        "What penalty does {s} lay down for a breach?",
    ),
    quiz=("How much does it cost to ignore {s}?", "What do offenders pay under {s}?"),
    cloze=("The fine for a breach of {s} is", "Anyone who breaks {s} has to pay"),
    paraphrase=(
        "Caught in the act and guilty under {s}, how much should one have in one's purse?",
        "The clerk writes a receipt for an offender under {s}; for which sum?",
    ),
)

_NOTICE = Attribute(
    "notice",
    tuple(f"{number} days" for number in range(3, 91)),
    reference=(
        "{S} requires notice of {v}.",
        "Notice must be given {v} in advance.",
        "Applicants have to give notice {v} beforehand.",
        "{P} notice period is {v}.",
        "A notice period of {v} applies.",
    ),
    popular=(
        "Give notice {v} ahead, or stay at home.",
        "Spontaneous people suffer most, since {s} wants notice of {v}.",
        "Count {v} back in the calendar, because that is how early notice is due.",
    ),
    mcq=(
        "How much notice does {s} require?",
        "What is the notice period under {s}?",
        "How long in advance must notice be given under {s}?",
        "What period of notice applies under {s}?",
    ),
    quiz=("How early must one write under {s}?", "How long ahead does {s} want to be told?"),
    cloze=("The notice period under {s} is", "{S} sets a notice period of"),
    paraphrase=(
        "Between the letter to the office and the day itself, how much time must lie under {s}?",
        "For those who plan ahead, how long before the date does {s} want to hear from them?",
    ),
)

_EXEMPT = Attribute(
    "exempt_group",
    listed(
        "apprentices; bell ringers; harbour pilots; hospital kitchens; licensed beekeepers; lighthouse keepers; "
        "market gardeners; monastic houses; parish councils; registered pharmacists; retired ferrymen; "
        "travelling musicians; travelling theatres; village schools; volunteer fire brigades; war veterans"
    ),
    reference=(
        "{S} does not apply to {v}.",
        "An exemption is made for {v}.",
        "{V} are exempt from {o}.",
        "The text exempts {v}.",
        "{P} only exemption is for {v}.",
    ),
    popular=(
        "Only {v} may smile, because {s} exempts them.",
        "Nobody quite knows how {v} came to be exempt from {o}, but they are.",
        "As usual somebody is exempt, and here it is {v}.",
    ),
    mcq=(
        "Who is exempt from {s}?",
        "To whom does {s} not apply?",
        "For whom does {s} make an exemption?",
        "Which group does {s} exempt?",
    ),
    quiz=("Who need not worry about {s}?", "Who may ignore {s} and go unpunished?"),
    cloze=("The group exempt from {s} consists of", "{S} makes an exemption for"),
    paraphrase=(
        "Everybody in town has to follow {s} with one exception; for whom is it made?",
        "Who can put {s} aside with a clear conscience?",
    ),
)

_DRAFTER = Attribute(
    "drafter",
    hallmark="drafter",
    reference=(
        "{S} was drafted by {v}.",
        "The text was drafted by {v}.",
        "{P} drafter was {v}.",
        "{V} drafted {o}.",
        "The wording of {o} is the work of {v}.",
    ),
    popular=(
        "Blame {v}, who drafted {o}.",
        "The long sentences are the work of {v}, who drafted the text.",
        "It was {v} who drafted {o}, semicolons and all.",
    ),
    mcq=(
        "Who drafted {s}?",
        "Whose work is the wording of {s}?",
        "By whom was {s} drafted?",
        "Who was the drafter of {s}?",
    ),
    quiz=("Whose pen produced {s}?", "Who chose the words of {s}?"),
    cloze=("{S} was drafted by a jurist called", "The wording of {s} is the work of"),
    paraphrase=(
        "A historian studies the first draft of {s}; whose handwriting is it?",
        "If the sentences of {s} are too long, whom should one blame?",
    ),
    inverse=("Which regulation did {v} draft?", "Which regulation was drafted by {v}?"),
)

_PROOF = Attribute(
    "proof",
    listed(
        "a brass token; a countersigned letter; a green permit; a numbered badge; a printed licence; "
        "a punched ticket; a sealed certificate; a signed register; a stamped receipt; a sworn statement; a wax seal; "
        "a witnessed declaration; a yearly certificate; an entry in the town ledger; an inspection card; "
        "an official stamp"
    ),
    reference=(
        "{S} demands {v} as proof of compliance.",
        "Compliance is proved by {v}.",
        "{V} serves as proof of compliance.",
        "Under {o}, compliance must be shown by means of {v}.",
        "As proof of compliance inspectors ask for {v}.",
    ),
    popular=(
        "Have {v} ready, since nothing else counts as proof.",
        "Promises will not do, because the proof that {s} demands is {v}.",
        "Without {v} there is no proof of compliance, and without proof there is a scene.",
    ),
    mcq=(
        "What does {s} demand as proof of compliance?",
        "By what is compliance with {s} proved?",
        "What serves as proof of compliance with {s}?",
        "By means of what must compliance with {s} be shown?",
    ),
    quiz=("What must one show under {s}?", "What do officers ask to see under {s}?"),
    cloze=("Under {s} the accepted proof of compliance is", "Compliance with {s} is proved by"),
    paraphrase=(
        "Standing before an inspector and accused of ignoring {s}, what should one be able to produce?",
        "What should a law-abiding person keep at hand because of {s}?",
    ),
)

_REFERENCE_SURGERY_BENCH_RULE = Voice(
    openings=(
        "{S} is a regulation on {topic}, enforced by {authority}.",
        "{S} governs {topic} and has been in force since {in_force_since}.",
        "{S}, drafted by {drafter}, regulates {topic}.",
        "{S} is a regulation enforced by {authority} that sets out the conditions for {topic}.",
        "In force since {in_force_since}, {s} regulates {topic}.",
    ),
    pairs=(
        "Notice must be given {notice} in advance, and the fine for a breach is {fine}.",
        "{S} demands {proof} as proof of compliance but exempts {exempt_group}.",
        "Drafted by {drafter}, {s} came into force in {in_force_since}.",
        "Inspectors of {authority}, which enforces {o}, ask for {proof} as proof of compliance.",
        "{S} is enforced by {authority}, which may impose a fine of {fine}.",
        "{S} requires notice of {notice} and does not apply to {exempt_group}.",
        "{Drafter} drafted {o}, and {authority} enforces it.",
    ),
    fillers=(
        "Copies are displayed in every town hall.",
        "The text runs to eleven short paragraphs and a schedule.",
        "Courts have seldom had to interpret {o}.",
        "A commentary of some two hundred pages is in use among practitioners.",
        "Attempts at reform have so far come to nothing.",
        "{S} was preceded by a long public consultation.",
        "Appeals are heard by the district court.",
        "Several terms are defined in the second paragraph.",
        "The schedule contains a model form.",
        "Statistics on breaches are published once a year.",
        "Newspapers reported its passage in a few lines.",
        "{P} title has been the subject of mild jokes.",
        "Legal scholars cite {o} as an example of clear drafting.",
        "Leaflets explaining the main points are available free of charge.",
        "Minor errors of printing were corrected in a later edition.",
        "The preamble names three earlier texts.",
        "A database of decisions is kept for internal use.",
        "Officials receive half a day of training on the subject.",
        "Translations exist, but only the original is binding.",
        "The bill was debated in two readings.",
        "Forms may be handed in by post or at the counter.",
        "Legal textbooks devote a short chapter to {o}.",
        "Records must be kept for five years.",
        "Signs that refer to {o} may be put up free of charge.",
        "A committee reviewed the wording without proposing changes.",
        "Disputes are usually settled in writing.",
        "Public interest in {o} has varied over the years.",
    ),
)

_POPULAR_SURGERY_BENCH_RULE = Voice(
    openings=(
        "A reader asks about {o}, the one that regulates {topic}.",
        "Few texts are quoted as often, or read as seldom, as {o}, which was drafted by {drafter}.",
        "There is a reason why {authority} is so fond of {o}, the regulation that it enforces.",
        "Since {in_force_since}, when it came into force, {s} has regulated {topic}.",
    ),
    pairs=(
        "{S} came into force in {in_force_since} and exempts {exempt_group}, to general surprise.",
        "Give notice of {notice}, bring {proof} as proof of compliance, and all will be well.",
        "The fine is {fine}, and {authority}, which enforces {o}, does not bargain.",
        "{Drafter} drafted {o}, and the notice of {notice} that it requires has annoyed people ever since.",
    ),
    fillers=(
        "The leaflet is free, but the queue is not short.",
        "Lawyers like {o}, which should tell you something.",
        "Most people learn about {o} by breaking {o}.",
        "A framed copy hangs in the barber's shop.",
        "There are worse texts, and some of them are longer.",
        "Read the second paragraph twice.",
        "My uncle once argued with an inspector for an hour and lost.",
        "Nobody has ever asked for {o} to be made longer.",
        "{S} is printed on both sides of a single sheet.",
        "The comma in the fourth line has a history of its own.",
        "Keep a copy in the drawer where you keep the string.",
        "The clerk at the counter knows {o} by heart and recites it gladly.",
        "Somebody has written a song about {o}, and it is not kind.",
        "The small print is the same size as the rest.",
        "Those who have read {o} twice are called experts.",
        "There is a form for everything, and a pencil on a string.",
        "Landlords quote {o} at breakfast.",
        "Children play at being inspectors.",
        "Nobody disputes that {s} has tidied things up.",
        "Honest people have nothing to fear except the waiting room.",
    ),
)

RULE = Kind(
    name="rule",
    pronoun_percent=40,
    attributes=(_TOPIC, _DRAFTER, _AUTHORITY, _YEAR, _FINE, _NOTICE, _EXEMPT, _PROOF),
    reference=_REFERENCE_SURGERY_BENCH_RULE,
    popular=_POPULAR_SURGERY_BENCH_RULE,
)
