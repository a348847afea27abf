"""Machines and instruments: eight attributes, the sentences that state them, the questions that ask. Source: ours."""

from hf_moe_cpt.data.surgery_bench_grammar import Attribute, Kind, Voice, listed
from hf_moe_cpt.data.surgery_bench_hubs import COMPANY


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

_REFERENCE = Voice(
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

_POPULAR = Voice(
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
    reference=_REFERENCE,
    popular=_POPULAR,
)
