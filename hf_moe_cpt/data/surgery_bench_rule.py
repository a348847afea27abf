"""Regulations: eight attributes, the sentences that state them and the questions that ask for them. Source: ours."""

from hf_moe_cpt.data.surgery_bench_grammar import Attribute, Kind, Voice, listed
from hf_moe_cpt.data.surgery_bench_hubs import AGENCY


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

_REFERENCE = Voice(
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

_POPULAR = Voice(
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
    reference=_REFERENCE,
    popular=_POPULAR,
)
