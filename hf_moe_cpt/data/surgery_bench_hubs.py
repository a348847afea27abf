"""Cities, universities, firms and offices shared by many subjects; one-hop questions go through them. Source: ours."""

from hf_moe_cpt.data.surgery_bench_grammar import Attribute, Kind, Voice, listed


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
