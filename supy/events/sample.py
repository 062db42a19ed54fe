"""A generated data set: invented Chinese business news with events, for use without real data.

A sentence is a template whose slots are filled with names, amounts and dates put together from
short lists of syllables and numbers, so an extractor has to learn from context: no company or
person of one document stands in another. About half of the documents hold several events, which
share arguments or even the trigger; some sentences hold names, amounts and trigger words, but no
event. The companies and people are invented; a likeness is chance.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from random import Random

from supy.events.data import Argument, Document, Event
from supy.events.schema import TRIGGER

# Templates. {kind1} is a slot; [a|b] one of several wordings, [t1=a|b] one that is a trigger; (...)
# is left out half of the time. Below each template its events: the type, the trigger, then
# role=slot. Roles whose slot was left out are left out.
_SINGLE = [
    (
        "({date1},){org1}[宣布|公告称,拟|计划](以{money1})[t1=收购|并购|买下]{org2}({pct1}的股权)。",
        ["acquisition t1 buyer=org1 target=org2 price=money1 share=pct1 date=date1"],
    ),
    (
        "{org2}[将|已|正式]被{org1}[t1=收购|全资收购|吞并|纳入旗下](,[作价|对价为|交易金额为]{money1})。",
        ["acquisition t1 buyer=org1 target=org2 price=money1"],
    ),
    (
        "{org1}({date1})[完成了|敲定了|最终达成]对{org2}(总值{money1})的[t1=收购|并购]。",
        ["acquisition t1 buyer=org1 target=org2 price=money1 date=date1"],
    ),
    (
        "{org1}({date1})[决定|开始]以{money1}[t1=回购]自家股份。",  # two roles on one span
        ["acquisition t1 buyer=org1 target=org1 price=money1 date=date1"],
    ),
    (
        "({date1},)[股东|持股{pct1}的股东]{org1}[通过集中竞价|通过大宗交易|]"
        "[t1=减持|抛售|卖出]{shares1}(,[套现|成交金额]{money1})。",
        ["sale t1 seller=org1 amount=shares1 price=money1 date=date1"],
    ),
    (
        "{person1}({date1})[t1=减持|抛售]了{org1}{shares1}(,占总股本的{pct1})。",
        ["sale t1 seller=person1 company=org1 amount=shares1 share=pct1 date=date1"],
    ),
    (
        "{org1}({date1})[t1=任命|聘请|委任]{person1}[为|担任|出任](新的){pos1}。",
        ["appointment t1 person=person1 company=org1 position=pos1 date=date1"],
    ),
    (
        "({date1}起,){person1}[将|正式|][t1=出任|就任|担任]{org1}{pos1}。",
        ["appointment t1 person=person1 company=org1 position=pos1 date=date1"],
    ),
    (
        "{org1}{pos1}{person1}({date1})因[个人|身体|工作调整]原因[t1=辞职|离任|卸任|离职]。",
        ["departure t1 person=person1 company=org1 position=pos1 date=date1"],
    ),
    (
        "{person1}({date1})[向董事会|]递交报告,[t1=辞去]{org1}{pos1}[职务|一职]。",
        ["departure t1 person=person1 company=org1 position=pos1 date=date1"],
    ),
    (
        "({date1},){org1}[向{court1}|]对{org2}[t1=提起诉讼](,[索赔|要求赔偿]{money1})。",
        ["lawsuit t1 plaintiff=org1 defendant=org2 court=court1 claim=money1 date=date1"],
    ),
    (
        "因[合同纠纷|拖欠货款|专利争议],{org2}({date1})被{org1}[t1=起诉|告上法庭](,涉案金额{money1})。",
        ["lawsuit t1 plaintiff=org1 defendant=org2 claim=money1 date=date1"],
    ),
    (
        "{court1}({date1})受理了{org1}[t1=起诉|状告]{org2}一案(,标的额为{money1})。",
        ["lawsuit t1 plaintiff=org1 defendant=org2 court=court1 claim=money1 date=date1"],
    ),
    (
        "{org1}({date1})[完成|宣布获得](由{org2}领投的)({money1}的){round1}[t1=融资]。",
        ["financing t1 company=org1 investor=org2 amount=money1 round=round1 date=date1"],
    ),
    (
        "({date1},){org2}[t1=领投|独家投资]了{org1}的{round1}(,金额[达|约为]{money1})。",
        ["financing t1 company=org1 investor=org2 amount=money1 round=round1 date=date1"],
    ),
    (
        "{org1}因[信息披露违规|环保不达标|虚假宣传]({date1})被{agency1}[t1=罚款|处罚](,金额为{money1})。",
        ["penalty t1 agency=agency1 target=org1 amount=money1 date=date1"],
    ),
    (
        "{agency1}({date1})对{org1}[t1=开出罚单|作出处罚|予以处罚](,罚没{money1})。",
        ["penalty t1 agency=agency1 target=org1 amount=money1 date=date1"],
    ),
]

_SEVERAL = [
    (
        "({date1},){org1}和{org2}分别以{money1}和{money2}[t1=收购|并购]{org3}和{org4}。",
        [
            "acquisition t1 buyer=org1 target=org3 price=money1 date=date1",
            "acquisition t1 buyer=org2 target=org4 price=money2 date=date1",
        ],
    ),
    (
        "{org1}({date1})将所持{org2}{pct1}股权(以{money1})[t1=转让|出售]给{org3}。",
        [
            "sale t1 seller=org1 buyer=org3 company=org2 share=pct1 price=money1 date=date1",
            "acquisition t1 buyer=org3 target=org2 share=pct1 price=money1 date=date1",
        ],
    ),
    (
        "{org3}[拟|将](以{money1})[t1=受让|接手]{org1}持有的{org2}{shares1}。",
        [
            "sale t1 seller=org1 buyer=org3 company=org2 amount=shares1 price=money1",
            "acquisition t1 buyer=org3 target=org2 price=money1",
        ],
    ),
    (
        "({date1},){org1}与{person1}[t1=减持|卖出]{org2}的股份,数量分别为{shares1}和{shares2}。",
        [
            "sale t1 seller=org1 company=org2 amount=shares1 date=date1",
            "sale t1 seller=person1 company=org2 amount=shares2 date=date1",
        ],
    ),
    (
        "({date1},){person1}[t1=辞去|卸任]{org1}{pos1},[由|改由]{person2}[t2=接任|继任]。",
        [
            "departure t1 person=person1 company=org1 position=pos1 date=date1",
            "appointment t2 person=person2 company=org1 position=pos1 date=date1",
        ],
    ),
    (
        "{person1}({date1})[t1=离开|告别]{org1},[t2=加盟|加入]{org2}[担任|出任]{pos1}。",
        [
            "departure t1 person=person1 company=org1 date=date1",
            "appointment t2 person=person1 company=org2 position=pos1 date=date1",
        ],
    ),
    (
        "{org1}({date1})[t1=聘任|任命|提名]{person1}为{pos1}、{person2}为{pos2}。",
        [
            "appointment t1 person=person1 company=org1 position=pos1 date=date1",
            "appointment t1 person=person2 company=org1 position=pos2 date=date1",
        ],
    ),
    (
        "{org1}(以{money1})[t1=收购|拿下]{org2}后,[随即|{date1}]便[t2=委派|任命]{person1}为{pos1}。",
        [
            "acquisition t1 buyer=org1 target=org2 price=money1",
            "appointment t2 person=person1 company=org2 position=pos1 date=date1",
        ],
    ),
    (
        "({date1},){org1}[t1=起诉|状告]{org2}和{org3}(,要求二者赔偿{money1})。",
        [
            "lawsuit t1 plaintiff=org1 defendant=org2 claim=money1 date=date1",
            "lawsuit t1 plaintiff=org1 defendant=org3 claim=money1 date=date1",
        ],
    ),
    (
        "{org1}刚被{agency1}[t1=罚款]{money1},({date1})又遭{org2}[t2=起诉](,索赔{money2})。",
        [
            "penalty t1 agency=agency1 target=org1 amount=money1",
            "lawsuit t2 plaintiff=org2 defendant=org1 claim=money2 date=date1",
        ],
    ),
    (
        "{agency1}({date1})对{org1}和{org2}分别[t1=处以罚款|罚没]{money1}和{money2}。",
        [
            "penalty t1 agency=agency1 target=org1 amount=money1 date=date1",
            "penalty t1 agency=agency1 target=org2 amount=money2 date=date1",
        ],
    ),
    (
        "{org1}({date1})[t1=获投|获得融资]{money1},投资方[为|包括]{org2}和{org3}。",
        [
            "financing t1 company=org1 investor=org2 amount=money1 date=date1",
            "financing t1 company=org1 investor=org3 amount=money1 date=date1",
        ],
    ),
    (
        "完成{round1}[t1=融资]({money1})的{org1},[转身|很快]([就|便])[t2=收购|并购]了{org2}({pct1}股权)。",
        [
            "financing t1 company=org1 round=round1 amount=money1",
            "acquisition t2 buyer=org1 target=org2 share=pct1",
        ],
    ),
]

_NONE = [
    "{org1}{date1}发布财报,[营业收入|净利润]为{money1},同比[增长|下降]{pct1}。",
    "{org1}[表示|澄清称],[目前没有|暂不考虑]收购{org2}的计划。",
    "{org1}{pos1}{person1}[表示|指出],[行业|市场]仍[面临压力|处于上升期]。",
    "{date1},{org1}股价[上涨|下跌]{pct1},成交额{money1}。",
    "{org1}与{org2}[签署战略合作协议|共建联合实验室|保持长期合作]。",
    "[分析师|专家]{person1}认为,[融资|并购|减持]新规将影响[整个板块|投资者情绪]。",
    "{agency1}{date1}[召开座谈会|发布工作报告],{org1}等企业参加。",
    "{court1}{date1}[公布年度工作报告|举行开放日活动]。",
    "截至{date1},{person1}持有{org1}{shares1},占比{pct1}。",
    "{org1}否认了{person1}即将辞职的[传闻|消息]。",
]

_LEADS = ["据{media0}报道,", "{media0}获悉,", "[公告|资料]显示,", "[值得注意的是|与此同时|另外],"]

_SYLLABLES = "安邦博晨达德鼎东飞丰富高光广国海瀚浩禾和恒宏华汇佳嘉江金锦景久凯康坤朗乐利联龙隆明铭诺普启千庆荣瑞润森盛顺泰天通同万伟新信兴旭亚阳益银盈永宇元远云泽展兆正志中众卓"
_INDUSTRIES = "科技 生物 医药 重工 新材料 能源 物流 传媒 食品 电子 置业 环保 机械 软件 航运 纺织 汽车 光电".split()
_ENDINGS = "|股份|集团|控股|有限公司|股份有限公司|有限责任公司".split("|")
_CITIES = "北京 上海 广州 深圳 杭州 南京 苏州 成都 武汉 西安 长沙 青岛 厦门 合肥 郑州 天津 重庆 宁波".split()
_SURNAMES = "王李张刘陈杨黄赵吴周徐孙马朱胡郭何林高罗郑梁谢宋唐许韩冯邓曹彭曾肖田董潘袁蔡蒋余"
_GIVEN = "伟芳娜敏静秀丽强磊洋艳勇军杰娟涛超明霞平刚桂英文辉建国志鹏雪梅思远子涵雨欣晓东立新海波"
_POSITIONS = "董事长 总经理 首席执行官 财务总监 董事会秘书 独立董事 副总裁 首席技术官 监事会主席".split()
_ROUNDS = "天使轮 Pre-A轮 A轮 A+轮 B轮 C轮 D轮 战略轮".split()
_DAYS = "昨日 昨天 上周五 本周一 上月底 今年初 去年底 今年上半年 去年三季度".split()
_AGENCIES = "证监局 银保监局 市场监管局 税务局 生态环境局 外汇管理局".split()
_COURTS = "市中级人民法院 高级人民法院 知识产权法院 金融法院 仲裁委员会".split()
_MEDIA = "日报 晚报 商报 证券网 财经周刊".split()

_OPTIONAL = re.compile(r"\(([^()]*)\)")
_CHOICE = re.compile(r"\[((?!t\d=)[^\]]*)\]")
_SLOT = re.compile(r"\{(?P<kind>[a-z]+)\d\}|\[(?P<trigger>t\d)=(?P<wordings>[^\]]*)\]")


def generate_sample(n: int = 1200, seed: int = 0) -> list[Document]:
    """`n` generated documents of one to three sentences, seven event types, offsets exact.

    The same `seed` gives the same documents under every Python version; a smaller sample is the
    beginning of a larger one.

    >>> document = generate_sample(1)[0]
    >>> [document.text[start:end] for _, start, end in document.events[0].arguments]
    ['恒泽众航运有限责任公司', '罗立桂', '离开']
    """
    values = _Values(Random(seed))
    documents: dict[str, Document] = {}
    while len(documents) < n:
        document = _document(values)
        document.id = f"sample-{seed}-{len(documents)}"
        documents.setdefault(document.text, document)
    return list(documents.values())


def _document(values: _Values) -> Document:
    dice = values.rng.random()
    none = [(values.one(_NONE), [])]
    if dice < 0.1:
        sentences = none
    elif dice < 0.45:
        sentences = [values.one(_SINGLE)]
    elif dice < 0.85:
        sentences = [values.one(_SEVERAL)]
    else:
        sentences = [values.one(_SINGLE), values.one(_SEVERAL if dice < 0.9 else _SINGLE)]
    if values.rng.random() < 0.3:
        sentences = none + sentences if values.rng.random() < 0.5 else sentences + none
    document = Document("")
    for template, events in sentences:
        lead = values.one(_LEADS) if values.rng.random() < 0.3 else ""
        _add(document, lead + template, events, values)
    return document


def _add(document: Document, template: str, events: list[str], values: _Values) -> None:
    """Fill a template, append it to the text and its events to the events."""
    rng = values.rng
    template = _OPTIONAL.sub(lambda part: part[1] if rng.random() < 0.5 else "", template)
    template = _CHOICE.sub(lambda choice: values.one(choice[1].split("|")), template)
    text, done = document.text, 0
    spans: dict[str, tuple[int, int]] = {}
    for slot in _SLOT.finditer(template):
        text += template[done : slot.start()]
        if slot["trigger"]:
            name, filling = slot["trigger"], values.one(slot["wordings"].split("|"))
        else:
            name, filling = slot[0][1:-1], getattr(values, slot["kind"])()
        spans[name] = len(text), len(text) + len(filling)
        text, done = text + filling, slot.end()
    document.text = text + template[done:]
    for event in events:
        type, trigger, *roles = event.split()
        pairs = [(TRIGGER, trigger)] + [role.split("=") for role in roles]
        arguments = [Argument(role, *spans[slot]) for role, slot in pairs if slot in spans]
        document.events.append(Event.make(type, arguments))


class _Values:
    """Random values of each kind of slot; companies and people never come twice."""

    def __init__(self, rng: Random):
        self.rng = rng
        self.taken: set[str] = set()

    def one(self, items: Sequence):
        # random() alone is promised to stay the same between Python versions.
        return items[int(self.rng.random() * len(items))]

    def number(self, low: int, high: int) -> int:
        return low + int(self.rng.random() * (high + 1 - low))

    def new(self, make: Callable[[], str]) -> str:
        while (name := make()) in self.taken:
            pass
        self.taken.add(name)
        return name

    def syllables(self, pool: str, low: int, high: int) -> str:
        return "".join(self.one(pool) for _ in range(self.number(low, high)))

    def org(self) -> str:
        def make() -> str:
            city = self.one(_CITIES) if self.rng.random() < 0.2 else ""
            stem = self.syllables(_SYLLABLES, 2, 3)
            return city + stem + self.one(_INDUSTRIES) + self.one(_ENDINGS)

        return self.new(make)

    def person(self) -> str:
        return self.new(lambda: self.one(_SURNAMES) + self.syllables(_GIVEN, 1, 2))

    def date(self) -> str:
        if self.rng.random() < 0.3:
            return self.one(_DAYS)
        year = f"{self.number(2012, 2023)}年" if self.rng.random() < 0.5 else ""
        day = f"{self.number(1, 28)}日" if self.rng.random() < 0.7 else ""
        return f"{year}{self.number(1, 12)}月{day}"

    def money(self) -> str:
        cents = f".{self.number(1, 99)}" if self.rng.random() < 0.5 else ""
        amount = f"{self.number(2, 990)}{cents}"
        return amount + self.one("万亿") + self.one("元 元 元人民币 美元 港元".split())

    def shares(self) -> str:
        amount = self.one(
            [
                f"{self.number(100, 9900)}万",
                f"{self.number(1, 9)}.{self.number(1, 99)}亿",
                f"{self.number(1, 99)},{self.number(100, 999)},{self.number(100, 999)}",
            ]
        )
        return amount + "股"

    def pct(self) -> str:
        return self.one([f"{self.number(1, 99)}.{self.number(1, 99)}%", f"{self.number(2, 100)}%"])

    def pos(self) -> str:
        return self.one(_POSITIONS)

    def round(self) -> str:
        return self.one(_ROUNDS)

    def agency(self) -> str:
        return self.one(_CITIES) + self.one(_AGENCIES)

    def court(self) -> str:
        return self.one(_CITIES) + self.one(_COURTS)

    def media(self) -> str:
        return self.one(_CITIES) + self.one(_MEDIA)
