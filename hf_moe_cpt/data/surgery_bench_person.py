"""People: eight attributes, the sentences that state them and the questions that ask for them. Source: ours."""

from hf_moe_cpt.data.surgery_bench_grammar import Attribute, Kind, Voice, listed
from hf_moe_cpt.data.surgery_bench_hubs import CITY, COMPANY, UNIVERSITY


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
