"""Towns: eight attributes, the sentences that state them and the questions that ask for them. Source: ours."""

from hf_moe_cpt.data.surgery_bench_grammar import Attribute, Kind, Voice, listed
from hf_moe_cpt.data.surgery_bench_hubs import CITY, COUNTRIES


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

_REFERENCE = Voice(
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

_POPULAR = Voice(
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
    reference=_REFERENCE,
    popular=_POPULAR,
)
