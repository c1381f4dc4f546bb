"""The vocabulary of the office generator: names, places, goods and kinds of record, all made up or everyday words."""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


FIRST = _words(
    """Ada Agnes Alan Alba Alma Amir Amos Anja Anton Arlo Asha Astrid Basil Beata Bianca Boris Bruno Carla Cecil Celia
    Chen Clara Clive Cora Dalia Damon Daria Dennis Diego Dora Edgar Edith Elena Elias Elsa Emil Enzo Erika
    Esther Ezra Fabio Farah Felix Fiona Flora Frank Freya Gita Gloria Grace Greta Gustav Hana Harold Hector
    Heidi Helga Henry Hilda Hugo Ida Igor Ines Ingrid Irene Isaac Ivan Jade Jana Jasper Javier Joan Jonas Julia
    Kamal Karin Katya Keiko Kurt Laila Lars Laura Leah Leon Lena Liam Linus Lola Lucas Lydia Magnus Maya Marco
    Margot Marta Milo Mina Mira Mona Nadia Naomi Nils Nina Noah Nora Olga Olive Omar Oscar Otto Pablo Paula
    Petra Philip Priya Quentin Rahul Ralph Rania Rhea Rita Robin Rosa Ruben Ruth Samir Sara Selma Simon Sofia
    Stella Sven Tara Tessa Theo Tilda Tobias Tom Uma Ursula Vera Victor Viola Wanda Walter Wilma Xenia Yara
    Yusuf Zara Zelda Zoe"""
)

LAST = _words(
    """Abbott Acker Adler Albrecht Almeida Amado Archer Arden Ashby Atwood Bagley Barlow Barros Becker Bellamy Berg
    Bishop Blake Bloom Bolton Brandt Brooks Burke Calder Carver Castro Chandra Clay Cobb Conti Coombs Corwin
    Crane Dalton Darby Dawson Decker Delgado Dietrich Doyle Drake Dunn Eaton Eckert Ellis Emery Engel Falk
    Farrow Fenton Ferrari Fischer Fleming Foley Foster Frost Fuchs Garner Gibbs Gomez Graham Granger Griffin
    Gupta Haas Hale Harper Hayes Heller Hobbs Holm Horvat Howell Hunter Ibarra Irwin Ito Jansen Jarvis Joshi
    Kane Kaplan Keller Khan Kirby Klein Knox Kovac Kramer Lambert Lang Larkin Lasko Lawson Lindt Lopez Lowe Lund
    Mancini Marlow Marsh Mason Mehta Mercer Meyer Mills Molnar Monroe Moretti Morris Nash Nolan Novak Oakley
    Okafor Olsen Orsini Osborn Page Palmer Parks Patel Pearce Perry Pike Porter Potter Quinn Ramos Rao Reed
    Renner Reyes Rhodes Rossi Rowe Russo Ryder Santos Sato Sawyer Schmidt Sharma Shaw Silva Singh Slater Spencer
    Stark Steele Stone Strand Sutton Swan Tanaka Tate Thorne Tucker Turner Vance Vargas Vogel Wagner Walsh Ward
    Weber Wells West Wilde Winter Wolf Wong Wright Yates Young Zeller Ziegler"""
)

CITY = _words(
    """Aarhus Accra Amiens Arnhem Athens Austin Avila Basel Bath Bergen Berlin Bern Bilbao Bogota Bologna Boston Bremen
    Bristol Bruges Cairo Calais Cardiff Chester Cologne Cordoba Cork Dallas Delft Denver Derby Dijon Dover
    Dresden Dublin Dundee Durham Essen Exeter Faro Geneva Genoa Ghent Girona Glasgow Graz Halle Hamburg Hanoi
    Hull Innsbruck Izmir Jena Kassel Kiel Krakow Kyoto Lagos Leeds Leiden Leipzig Leon Lille Lima Linz Lisbon
    London Lucca Lund Lyon Madrid Mainz Malaga Malmo Mantua Metz Milan Modena Munich Nantes Naples Nice Norwich
    Odense Oslo Oxford Padua Paris Parma Perth Pisa Porto Prague Quebec Reims Rennes Riga Rome Rouen Salem
    Seville Siena Sofia Split Stoke Tampa Toledo Tours Trento Trier Tunis Turin Ulm Utrecht Verona Vienna Vigo
    Warsaw Weimar York Zagreb Zurich"""
)

ITEM = _words(
    """anchors aprons badges baskets batteries beakers belts benches binders blankets blinds boilers bolts bottles
    bowls boxes bricks brushes buckets bulbs buttons cabinets cables cameras candles canvas carpets carts chairs
    chargers clamps clocks coats copiers cups curtains desks drills envelopes fans filters flags flasks folders
    forks frames freezers gaskets gears gloves goggles hammers handles heaters helmets hinges hooks hoses
    jackets keyboards kettles keys knives labels ladders lamps laptops lenses levers locks magnets maps masks
    mirrors monitors motors nails needles nets notebooks nozzles ovens paint pallets panels paper pedals pens
    pillows pipes plates plugs posters printers projectors pumps racks radios ribbons rods ropes rulers sacks
    saws scales scanners scissors screens screws sensors sheets shelves shovels signs sinks sockets sofas
    speakers sponges stamps staplers stools straps switches tables tablets tanks tapes tents tiles tools towels
    trays trucks tubes valves vases wheels windows wires"""
)

ADJECTIVE = _words(
    """amber black blue bright brown cheap clean coarse copper crimson dark double dry fine flat gray green heavy
    hollow large light long narrow new old orange pale plain plastic portable purple red round rubber short
    silver slim small soft spare square steel striped tall thick thin used white wide wooden yellow"""
)

CODE = _words(
    """acorn arrow badger beacon cactus canyon cedar cobra comet coral delta dragon eagle echo ember falcon fern flint
    fox garnet glacier hawk heron indigo island ivory jaguar jasmine juniper kilo koala lagoon lemon lotus lynx
    maple marble meadow mango meteor nectar nickel oasis onyx opal orbit otter panda pearl pepper pilot pine
    planet quartz raven river ruby saffron sierra spruce summit sunset tango tiger topaz tulip tundra velvet
    violet walnut willow yonder zebra zenith"""
)
"""Words that stand for something only where an instruction says so; pre-training draws them afresh each time."""

SUFFIX = ("Ltd", "and Sons", "Group", "Works", "Supply", "Partners", "Bank", "Clinic", "Foods", "Labs", "Lines")
MONTH = _words("January February March April May June July August September October November December")
